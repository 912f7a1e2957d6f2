"""COCO: every image and caption in its split, and every faulty field named."""

import re

import pytest

from tests.data.formats.conftest import convert, error_of, lose, set_at, write_json


def image(split: str, identity: int, *captions: str, folder: str = "val2014") -> dict:
    return {
        "filepath": folder,
        "filename": f"COCO_{folder}_{identity:012d}.jpg",
        "split": split,
        "cocoid": identity,
        "sentids": [1],
        "imgid": 0,
        "sentences": [{"raw": caption, "tokens": [], "sentid": 1} for caption in captions],
    }


CONTENT = {
    "dataset": "coco",
    "images": [
        image("test", 391895, "A man on a bike. ", "A man on a bike.", "Ein Fluß"),
        image("restval", 60623, "Ice cream"),
        image("train", 9, "Food", folder="train2014"),
        image("val", 42, "A dog\n"),
    ],
}


def test_splits_stay_apart_and_restval_joins_training(tmp_path):
    write_json(tmp_path / "dataset_coco.json", CONTENT, bom=True)
    read = convert("coco", tmp_path)
    assert [(split, sample.key) for split, sample in read.samples] == [
        ("test", "000000391895"),
        ("train", "000000060623"),
        ("train", "000000000009"),
        ("val", "000000000042"),
    ]
    assert not read.omitted


def test_repeated_captions_of_an_image_appear_once_in_their_order(tmp_path):
    write_json(tmp_path / "dataset_coco.json", CONTENT)
    read = convert("coco", tmp_path)
    (sample,) = read.split("test")
    captions = ["A man on a bike.", "Ein Fluß"]
    assert sample.content == {"image_id": 391895, "captions": captions}
    assert read.split("val")[0].content == {"image_id": 42, "captions": ["A dog"]}


def test_images_lie_in_the_folder_the_release_names(tmp_path):
    write_json(tmp_path / "src" / "dataset_coco.json", CONTENT)
    files = [sample.images for _, sample in convert("coco", tmp_path / "src", tmp_path / "images").samples]
    assert files == [
        (tmp_path / "images" / "val2014" / "COCO_val2014_000000391895.jpg",),
        (tmp_path / "images" / "val2014" / "COCO_val2014_000000060623.jpg",),
        (tmp_path / "images" / "train2014" / "COCO_train2014_000000000009.jpg",),
        (tmp_path / "images" / "val2014" / "COCO_val2014_000000000042.jpg",),
    ]


ERRORS = [
    (lose("images"), ": field 'images' is missing; list expected, as in the public release"),
    (set_at("images", value={"0": 1}), ": field 'images' is {'0': 1}; list expected"),
    (set_at("images", 1, value="a.jpg"), ": images[1]: is 'a.jpg'; an object with the field 'split' expected"),
    (lose("images", 2, "split"), ": images[2]: field 'split' is missing; str expected"),
    (
        set_at("images", 1, "split", value="../x"),
        ": images[1]: field 'split' is '../x'; one of train, restval, val, test",
    ),
    (lose("images", 2, "cocoid"), ": images[2]: field 'cocoid' is missing; int expected"),
    (set_at("images", 2, "cocoid", value="nine"), ": images[2]: field 'cocoid' is 'nine'; int expected"),
    (lose("images", 1, "filepath"), ": images[1]: field 'filepath' is missing; str expected"),
    (lose("images", 3, "filename"), ": images[3]: field 'filename' is missing; str expected"),
    (lose("images", 3, "sentences"), ": images[3]: field 'sentences' is missing; list expected"),
    (set_at("images", 3, "sentences", value=[]), ": images[3].sentences: have no text; every image needs at least one"),
    (set_at("images", 0, "sentences", 2, "raw", value=7), ": images[0].sentences[2]: field 'raw' is 7; str expected"),
    (lose("images", 0, "sentences", 1, "raw"), ": images[0].sentences[1]: field 'raw' is missing; str expected"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_field_is_named(tmp_path, change, expected):
    path = write_json(tmp_path / "dataset_coco.json", change(CONTENT))
    assert re.match(re.escape(f"{path}{expected}"), error_of("coco", tmp_path))
