"""Flickr30K: as COCO, but named after its photos' numbers and in either of two folders."""

import json
import re

import pytest
from PIL import Image

from tests.data.formats.conftest import convert, error_of, lose, set_at, write_json

CONTENT = {
    "dataset": "flickr30k",
    "images": [
        {"filename": "1000092795.jpg", "split": "train", "sentences": [{"raw": "Two men ."}, {"raw": "Two men ."}]},
        {"filename": "36979.jpg", "split": "val", "sentences": [{"raw": "Ein „Café“ "}]},
        {"filename": "65567.jpg", "split": "test", "sentences": [{"raw": "A dog"}]},
    ],
}


def test_photos_are_numbered_by_their_files_names(tmp_path):
    write_json(tmp_path / "dataset_flickr30k.json", CONTENT, bom=True)
    read = convert("flickr30k", tmp_path)
    assert [(split, sample.key, sample.content) for split, sample in read.samples] == [
        ("train", "001000092795", {"image_id": 1000092795, "captions": ["Two men ."]}),
        ("val", "000000036979", {"image_id": 36979, "captions": ["Ein „Café“"]}),
        ("test", "000000065567", {"image_id": 65567, "captions": ["A dog"]}),
    ]
    assert not read.omitted


@pytest.mark.parametrize("folder", ["flickr30k-images", "."])
def test_photos_lie_in_their_folder_or_in_the_images_folder(tmp_path, folder):
    write_json(tmp_path / "dataset_flickr30k.json", CONTENT)
    images = tmp_path / "images"
    (images / folder).mkdir(parents=True)
    read = convert("flickr30k", tmp_path, images)
    assert [sample.images for _, sample in read.samples] == [
        (images / folder / name,) for name in ("1000092795.jpg", "36979.jpg", "65567.jpg")
    ]


NUMBER = "a photo's number of at most 12 digits expected, as in the public release"
ERRORS = [
    (lose("images", 1, "filename"), ": images[1]: field 'filename' is missing; str expected"),
    (set_at("images", 1, "filename", value=36979), ": images[1]: field 'filename' is 36979; str expected"),
    (set_at("images", 1, "filename", value="dog.jpg"), f": images[1]: field 'filename' is 'dog.jpg'; {NUMBER}"),
    (set_at("images", 1, "filename", value="../1.jpg"), f": images[1]: field 'filename' is '../1.jpg'; {NUMBER}"),
    (set_at("images", 1, "filename", value=".jpg"), f": images[1]: field 'filename' is '.jpg'; {NUMBER}"),
    (set_at("images", 1, "filename", value="٣.jpg"), f": images[1]: field 'filename' is '٣.jpg'; {NUMBER}"),
    (
        set_at("images", 1, "filename", value=f"{10**12}.jpg"),
        f": images[1]: field 'filename' is '{10**12}.jpg'; {NUMBER}",
    ),
    (
        set_at("images", 2, "split", value="dev"),
        ": images[2]: field 'split' is 'dev'; one of train, restval, val, test",
    ),
    (set_at("images", 2, "sentences", value=[]), ": images[2].sentences: have no text; every image needs at least one"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_field_is_named(tmp_path, change, expected):
    path = write_json(tmp_path / "dataset_flickr30k.json", change(CONTENT))
    assert re.match(re.escape(f"{path}{expected}"), error_of("flickr30k", tmp_path))


def test_all_that_the_toy_writes_is_read(drawn):
    source = drawn / "flickr30k"
    wanted = json.loads((source / "dataset_flickr30k.json").read_text())["images"]
    read = convert("flickr30k", source)
    assert {split for split, _ in read.samples} == {"train", "val", "test"}
    assert [(split, sample.content) for split, sample in read.samples] == [
        (
            image["split"],
            {
                "image_id": int(image["filename"].removesuffix(".jpg")),
                "captions": [sentence["raw"] for sentence in image["sentences"]],
            },
        )
        for image in wanted
    ]
    for _, sample in read.samples:
        (file,) = sample.images
        assert Image.open(file).size == (32, 32)
