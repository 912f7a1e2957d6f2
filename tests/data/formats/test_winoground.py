"""Winoground: two images and two captions a line."""

import re
from pathlib import Path

import pytest

from tests.data.formats.conftest import convert, error_of, lose, set_at, write_lines

RECORDS = [
    {
        "id": number,
        "image_0": f"ex_{number}_img_0",
        "image_1": f"ex_{number}_img_1",
        "caption_0": "an old person kisses a young person",
        "caption_1": "a young person kisses an old person ",
        "tag": "Adjective-Age",
        "secondary_tag": "",
        "num_main_preds": 1,
        "collapsed_tag": tag,
    }
    for number, tag in enumerate(("Object", "Relation"))
]


def write_source(root: Path, end: str = "\n", bom: bool = False) -> Path:
    write_lines(root / "examples.jsonl", RECORDS, end, bom)
    return root


@pytest.mark.parametrize(("end", "bom"), [("\n", False), ("\r\n", True)], ids=["release", "windows"])
def test_each_line_is_a_sample_of_two_images_and_a_caption_of_each(tmp_path, end, bom):
    (split, sample), (_, other) = convert("winoground", write_source(tmp_path, end, bom)).samples
    assert (split, sample.key, other.key) == ("test", "0", "1")
    assert sample.content == {
        "identifier": "0",
        "category": "Object",
        "image_id": "0",
        "choices": [
            {"text": "an old person kisses a young person", "image": 0},
            {"text": "a young person kisses an old person", "image": 1},
        ],
    }
    assert sample.ids == ("0",)


@pytest.mark.parametrize("folder", ["images", "."])
def test_images_lie_in_images_or_in_the_folder_itself(tmp_path, folder):
    (tmp_path / "pictures" / folder).mkdir(parents=True)
    _, (_, sample) = convert("winoground", write_source(tmp_path), tmp_path / "pictures").samples
    assert sample.images == tuple(tmp_path / "pictures" / folder / f"ex_1_img_{number}.png" for number in range(2))


ERRORS = [
    (set_at(1, value=7), ": line 2: is 7; an object with the field 'id' expected"),
    (lose(0, "id"), ": line 1: field 'id' is missing; int expected"),
    (set_at(0, "id", value="0"), ": line 1: field 'id' is '0'; int expected"),
    (set_at(0, "image_1", value="a/b"), ": line 1: field 'image_1' is 'a/b'; a file's name without a folder expected"),
    (set_at(1, "image_0", value={"bytes": ""}), ": line 2: field 'image_0' is {'bytes': ''}; str expected"),
    (lose(1, "caption_1"), ": line 2: field 'caption_1' is missing; str expected"),
    (set_at(0, "caption_0", value=""), ": line 1: field 'caption_0' is empty; remove the record or give it a text"),
    (set_at(0, "collapsed_tag", value=None), ": line 1: field 'collapsed_tag' is missing; str expected"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_line_is_named(tmp_path, change, expected):
    path = write_lines(write_source(tmp_path) / "examples.jsonl", change(RECORDS))
    assert re.match(re.escape(f"{path}{expected}"), error_of("winoground", tmp_path))
