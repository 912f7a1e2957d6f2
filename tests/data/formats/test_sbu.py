"""SBU: the release's captions and URLs, or the list of what was downloaded."""

import re

import pytest

from tests.data.formats.conftest import convert, error_of, lose, set_at, write_json

RELEASE = {
    "user_ids": ["a", "b", "c", "d"],
    "captions": ["Street scene in Kyōto. ", "", "My dog", "My dog"],
    "image_urls": [
        "http://static.flickr.com/2723/4385058960_b0f291553e.jpg",
        "http://static.flickr.com/1/2.jpg",
        "http://static.flickr.com/3/4_x.jpg?zz=1#top",
        "http://static.flickr.com/3/4_y.jpg",
    ],
}
ANNOT = [
    ["images_train/0000/0000000", "Street scene in Kyōto. "],
    ["images_train/0000/0000001", "\t"],
    ["elsewhere/0002/0000002.jpg", "My dog"],
    ["0000003.jpg", "My dog"],
]


def test_images_of_the_release_are_named_like_their_urls(tmp_path):
    write_json(tmp_path / "sbu-captions-all.json", RELEASE, bom=True)
    read = convert("sbu", tmp_path, tmp_path / "SBU")
    assert [(split, sample.key, sample.images, sample.content) for split, sample in read.samples] == [
        (
            "train",
            f"{row:09d}",
            (tmp_path / "SBU" / name,),
            {"image_id": row, "captions": [caption]},
        )
        for row, name, caption in (
            (0, "4385058960_b0f291553e.jpg", "Street scene in Kyōto."),
            (2, "4_x.jpg", "My dog"),
            (3, "4_y.jpg", "My dog"),
        )
    ]
    assert read.omitted == {"empty caption": 1}


def test_downloaded_images_are_at_the_listed_path_or_in_the_images_folder(tmp_path):
    (tmp_path / "images_train" / "0000").mkdir(parents=True)
    write_json(tmp_path / "annot.json", ANNOT)
    read = convert("sbu", tmp_path)
    assert [(sample.key, sample.images, sample.content["captions"]) for sample in read.split("train")] == [
        ("000000000", (tmp_path / "images_train" / "0000" / "0000000",), ["Street scene in Kyōto."]),
        ("000000002", (tmp_path / "0000002.jpg",), ["My dog"]),
        ("000000003", (tmp_path / "0000003.jpg",), ["My dog"]),
    ]
    assert read.omitted == {"empty caption": 1}


def test_rows_of_one_file_are_one_image(tmp_path):
    urls = RELEASE["image_urls"]
    write_json(tmp_path / "sbu-captions-all.json", RELEASE | {"image_urls": [urls[2], urls[1], urls[2], urls[3]]})
    ids = [sample.content["image_id"] for sample in convert("sbu", tmp_path).split("train")]
    assert ids == [0, 0, 3]
    write_json(tmp_path / "annot.json", [["a/1.jpg", "one"], ["b/1.jpg", "two"], ["a/1.jpg", "three"]])
    ids = [sample.content["image_id"] for sample in convert("sbu", tmp_path).split("train")]
    assert ids == [0, 1, 0]
    write_json(tmp_path / "annot.json", [])
    assert error_of("sbu", tmp_path) == f"{tmp_path / 'annot.json'}: has no pair; write it again"


def test_a_list_of_downloads_has_precedence_over_the_release(tmp_path):
    write_json(tmp_path / "sbu-captions-all.json", RELEASE)
    write_json(tmp_path / "annot.json", [["1.jpg", "only this"]])
    assert [sample.content["captions"] for _, sample in convert("sbu", tmp_path).samples] == [["only this"]]


URL = "a URL that ends in a file name expected"
ERRORS = [
    (lose("captions"), ": field 'captions' is missing; list expected"),
    (lose("image_urls"), ": field 'image_urls' is missing; list expected"),
    (lose("image_urls", 3), ": has 4 captions and 3 image_urls; download it again"),
    (set_at("captions", 2, value=None), ": captions[2]: is None; str expected, as in the public release"),
    (set_at("image_urls", 2, value=None), f": image_urls[2]: is None; {URL}"),
    (set_at("image_urls", 2, value="http://flickr.com/3/"), f": image_urls[2]: is 'http://flickr.com/3/'; {URL}"),
    (set_at("image_urls", 2, value="http://flickr.com"), f": image_urls[2]: is 'http://flickr.com'; {URL}"),
    (set_at("image_urls", 2, value="http://[x/1.jpg"), f": image_urls[2]: is 'http://[x/1.jpg'; {URL}"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_field_of_the_release_is_named(tmp_path, change, expected):
    path = write_json(tmp_path / "sbu-captions-all.json", change(RELEASE))
    assert re.match(re.escape(f"{path}{expected}"), error_of("sbu", tmp_path))


PAIR = "[path, caption] expected"
ANNOT_ERRORS = [
    (set_at(2, value="0000002.jpg"), f": [2]: is '0000002.jpg'; {PAIR}"),
    (set_at(2, value=["0000002.jpg"]), f": [2]: is ['0000002.jpg']; {PAIR}"),
    (set_at(2, 1, value=None), f": [2]: is ['elsewhere/0002/0000002.jpg', None]; {PAIR}"),
    (set_at(2, 0, value="a/"), ": [2]: path is 'a/'; an image file expected, remove the record or name it"),
    (set_at(3, 0, value=""), ": [3]: path is ''; an image file expected, remove the record or name it"),
    (lambda content: {"annot": content}, ": is {'annot': [['images_train/0000/0000000', "),
]


@pytest.mark.parametrize(("change", "expected"), ANNOT_ERRORS, ids=[expected for _, expected in ANNOT_ERRORS])
def test_a_bad_entry_of_the_list_is_named(tmp_path, change, expected):
    path = write_json(tmp_path / "annot.json", change(ANNOT))
    assert re.match(re.escape(f"{path}{expected}"), error_of("sbu", tmp_path))
