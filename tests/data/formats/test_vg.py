"""Visual Genome: one sample an image, its phrases once each with the box they came with first."""

import re
from pathlib import Path

import pytest

from tests.data.formats.conftest import convert, error_of, lose, set_at, write_json


def region(image: int, phrase: str, *box: int) -> dict:
    x, y, width, height = box
    return {"region_id": 1382, "image_id": image, "phrase": phrase, "x": x, "y": y, "width": width, "height": height}


CONTENT = [
    {
        "id": 1,
        "regions": [
            region(1, "the clock is green", 421, 57, 82, 139),
            region(1, "shade along the street ", 194, 372, 182, 109),
            region(1, " the clock is green", 1, 2, 3, 4),
            region(1, " ", 5, 6, 7, 8),
            region(1, "\u200b", 5, 6, 7, 8),
            region(1, "ein Fluß", -1, 0, 9, 9),
            region(1, "The clock is green", 2, 3, 4, 5),
        ],
    },
    {"id": 61512, "regions": [region(61512, "", 0, 0, 1, 1), region(61512, "\n", 0, 0, 1, 1)]},
    {"id": 2, "regions": []},
    {"id": 107899, "regions": [region(107899, "a dog", 10, 20, 30, 40)]},
    {"id": 5, "regions": [region(5, "\u200b\ufeff", 0, 0, 1, 1)]},
]


@pytest.fixture
def source(tmp_path) -> Path:
    for name in ("VG_100K/107899.jpg", "VG_100K_2/1.jpg", "VG_100K/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    write_json(tmp_path / "region_descriptions.json", CONTENT, bom=True)
    return tmp_path


def test_phrases_are_listed_once_with_their_first_boxes(source):
    read = convert("vg", source)
    assert [(split, sample.key) for split, sample in read.samples] == [
        ("train", "000000000001"),
        ("train", "000000107899"),
    ]
    assert read.samples[0][1].content == {
        "image_id": 1,
        "captions": ["the clock is green", "shade along the street", "ein Fluß", "The clock is green"],
        "regions": [[421, 57, 82, 139], [194, 372, 182, 109], [-1, 0, 9, 9], [2, 3, 4, 5]],
    }


def test_empty_phrases_and_images_without_any_are_counted(source):
    assert convert("vg", source).omitted == {"empty phrase": 5, "image without a phrase": 3}


def test_images_may_be_in_either_folder(source):
    files = [sample.images for _, sample in convert("vg", source).samples]
    assert files == [(source / "VG_100K_2" / "1.jpg",), (source / "VG_100K" / "107899.jpg",)]


def test_a_missing_image_is_left_to_the_writer(source):
    (source / "VG_100K_2" / "1.jpg").unlink()
    file = convert("vg", source).samples[0][1].images[0]
    assert file.name == "1.jpg"
    assert not file.exists()


def test_one_folder_of_images_is_enough(source):
    (source / "VG_100K_2" / "1.jpg").unlink()
    (source / "VG_100K_2").rmdir()
    assert len(convert("vg", source).samples) == 2


def test_images_without_their_folders_are_named(tmp_path):
    write_json(tmp_path / "region_descriptions.json", CONTENT)
    expected = f"{tmp_path}: contains neither VG_100K/ nor VG_100K_2/; --images must name the folder of both"
    assert error_of("vg", tmp_path) == expected


ERRORS = [
    (set_at(2, value="one"), ": [2]: is 'one'; an object with the field 'regions' expected"),
    (lose(0, "regions"), ": [0]: field 'regions' is missing; list expected"),
    (set_at(0, "regions", 1, value=None), ": [0].regions[1]: is None; an object with the field 'image_id' expected"),
    (lose(0, "regions", 0, "image_id"), ": [0].regions[0]: field 'image_id' is missing; int expected"),
    (
        set_at(0, "regions", 2, "image_id", value=2),
        ": [0].regions[2]: field 'image_id' is 2, 1 before it; one image a record expected",
    ),
    (lose(3, "regions", 0, "phrase"), ": [3].regions[0]: field 'phrase' is missing; str expected"),
    (set_at(3, "regions", 0, "phrase", value=7), ": [3].regions[0]: field 'phrase' is 7; str expected"),
    *[
        (lose(0, "regions", 4, side), f": [0].regions[4]: field '{side}' is missing; int expected")
        for side in ("x", "y", "width", "height")
    ],
    (set_at(0, "regions", 3, "width", value="7"), ": [0].regions[3]: field 'width' is '7'; int expected"),
    (lambda content: {"images": content}, ": is {'images': [{'id': 1, 'regions': "),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_field_is_named(source, change, expected):
    path = write_json(source / "region_descriptions.json", change(CONTENT))
    assert re.match(re.escape(f"{path}{expected}"), error_of("vg", source))
