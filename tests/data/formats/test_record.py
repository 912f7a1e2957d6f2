"""Readers: what they accept, and that each error is named with its position and its fix."""

import re
from pathlib import Path

import pytest

from tests.data.formats.conftest import BOM, write_json, write_lines
from unimo3.data.formats.record import (
    Sample,
    choice,
    distinct,
    field,
    first_file,
    read_json,
    read_lines,
    read_records,
    text,
)
from unimo3.errors import DataError


def test_json_may_have_a_byte_order_mark_and_any_script(tmp_path):
    path = write_json(tmp_path / "a.json", {"raw": "ein Fluß, 川, 🚲"}, bom=True)
    assert path.read_bytes().startswith(BOM)
    assert read_json(path, dict) == {"raw": "ein Fluß, 川, 🚲"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"a\.json: cannot be read \(No such file or directory\); --src must name the data set's folder"),
        (b'{"images": [', r"a\.json: is not JSON \(.*\); download it again"),
        (b'"\xff"', r"a\.json: is not JSON \(.*utf-8.*\); download it again"),
        (b'[{"a": 1}]', r"a\.json: is \[\{'a': 1\}\]; dict expected as the outermost value"),
    ],
)
def test_bad_json_files_are_named(tmp_path, content, expected):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_json(path, dict)


def test_only_newlines_end_a_line_and_carriage_returns_are_dropped(tmp_path):
    path = write_lines(
        tmp_path / "a.tsv", ["one\u2028still one\x0b\x85", "two\rstill two", "", "four"], "\r\n", bom=True
    )
    lines = list(read_lines(path))
    assert [line for _, line in lines] == ["one\u2028still one\x0b\x85", "two\rstill two", "", "four"]
    assert lines[3][0] == f"{path}: line 4"


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"one\ntwo")
    assert [line for _, line in read_lines(path)] == ["one", "two"]


def test_a_line_that_is_not_utf8_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"fine\n" * 40 + b"caf\xe9\n" + b"fine\n")
    with pytest.raises(DataError, match=r"a\.tsv: line 41: is not UTF-8 \(.*0xe9.*\); download the file again"):
        list(read_lines(path))


def test_lines_of_a_missing_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.tsv: cannot be read \(No such file or directory\); --src must"):
        next(read_lines(tmp_path / "a.tsv"))


def test_records_are_read_one_by_one_with_their_lines_numbers(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"a": "é"}, "  ", {"a": 2}, "{'a': 3}"], "\r\n", bom=True)
    records = read_records(path)
    assert next(records) == (f"{path}: line 1", {"a": "é"})
    assert next(records) == (f"{path}: line 3", {"a": 2})
    with pytest.raises(DataError, match=r"a\.jsonl: line 4: is not JSON \(.*\); download the file again"):
        next(records)


def test_the_first_file_that_exists_is_used(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert first_file(one, two) == one
    two.write_text("")
    assert first_file(one, two) == two
    one.write_text("")
    assert first_file(one, two) == one


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({}, int, "here: field 'a' is missing; int expected, as in the public release"),
        ({"a": None}, str, "here: field 'a' is missing; str expected, as in the public release"),
        ({"a": "3"}, int, "here: field 'a' is '3'; int expected, as in the public release"),
        ({"a": 3.0}, int, "here: field 'a' is 3.0; int expected, as in the public release"),
        ({"a": True}, int, "here: field 'a' is True; int expected, as in the public release"),
        ([1], int, "here: is [1]; an object with the field 'a' expected"),
        (None, int, "here: is None; an object with the field 'a' expected"),
    ],
)
def test_a_bad_field_is_named_with_its_value(record, kind, expected):
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        field(record, "a", "here", kind)


def test_fields_are_given_as_they_are():
    record = {"number": 0, "text": "", "truth": False, "list": []}
    assert field(record, "number", "here", int) == 0
    assert field(record, "text", "here", str) == ""
    assert field(record, "truth", "here", bool) is False
    assert field(record, "list", Path("here"), list) == []


def test_a_huge_value_does_not_fill_the_message():
    with pytest.raises(DataError) as caught:
        field({"a": list(range(10_000))}, "a", "here", str)
    assert len(str(caught.value)) < 200


def test_texts_are_stripped_and_must_not_be_empty():
    assert text({"a": " two words\r\n"}, "a", "here") == "two words"
    with pytest.raises(DataError, match="here: field 'a' is empty; remove the record or give it a text"):
        text({"a": " \t\u3000"}, "a", "here")


def test_a_choice_outside_its_options_is_named_with_all_of_them():
    assert choice({"a": "val"}, "a", "here", ("train", "val")) == "val"
    with pytest.raises(DataError, match="here: field 'a' is 'Val'; one of train, val expected"):
        choice({"a": "Val"}, "a", "here", ("train", "val"))


def test_distinct_captions_keep_their_order():
    assert distinct(["b", " a ", "b ", "", "A", "a", "  "]) == ["b", "a", "A"]


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"questions": [{"question_id": 7}, {"question_id": 5}]}, (7, 5)),
        ({"hypotheses": [{"pair_id": "1.jpg#0r1e"}]}, ("1.jpg#0r1e",)),
        ({"identifier": "dev-1-0-0", "statement": "a dog"}, ("dev-1-0-0",)),
        ({"captions": ["a dog"]}, ()),
    ],
)
def test_ids_are_those_of_the_files_of_predictions(content, ids):
    assert Sample("key", (), {"image_id": 1} | content).ids == ids
