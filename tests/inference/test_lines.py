"""Lines of --input: each has one line in the output, with answers or with its error, whatever is in it."""

import json
import re

import pytest

from tests.data.conftest import draw_jpeg
from unimo3.errors import ConfigError, DataError
from unimo3.inference.inputs import _read_image
from unimo3.inference.lines import Answerer, answer_file, count_lines, encoded, images_of, text_of


def answer(folder, content: bytes) -> list[dict]:
    """The records of an input whose answers are the size of the image and the text."""
    (folder / "photo.jpg").write_bytes(draw_jpeg(0))
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(content)

    def parse(line):
        return _read_image(images_of(line, 1, folder)[0]).size, text_of(line)

    how = Answerer(parse, lambda rows: [[{"answer": row}] for row in rows], 3)
    num_lines, errors = answer_file(source, target, how)
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(records) == num_lines == count_lines(source)
    assert len(errors) == sum("error" in record for record in records)
    return records


GOOD = b'{"image": "photo.jpg", "text": "what is it?"}'
BAD = {
    b'{"image": "a\\u0000.jpg", "text": "a"}': "cannot be read (embedded null byte); name an image file",
    b'{"image": "\\ud83d.jpg", "text": "a"}': "surrogates not allowed",
    b'{"image": "photo.jpg/\\udc00/a", "text": "a"}': "cannot be read",
    b'{"image": ["\\u0000"], "text": "a"}': "cannot be read",
    b'{"image": "' + b"x" * 5000 + b'", "text": "a"}': "File name too long",
    b'{"image": ".", "text": "a"}': "cannot be read (Is a directory)",
    b'{"image": "", "text": "a"}': "a path is needed",
    b'{"image": "photo.jpg", "text": ["\\ud83d"]}': "a text is needed",
    b'{"image": "photo.jpg", "text": "\xff"}': "is no JSON",
    b'{"image": ' + b"[" * 900 + b"]" * 900 + b', "text": "a"}': "is needed",
    b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "is nested too deeply",
    b"9" * 5000: "is no JSON",
}


def test_a_line_that_cannot_be_used_has_its_error_others_are_answered(tmp_path):
    records = answer(tmp_path, b"\n".join([GOOD, *BAD, GOOD]) + b"\n")
    assert [record["line"] for record in records] == list(range(1, len(BAD) + 3))
    assert records[0]["answers"] == records[-1]["answers"] == [{"answer": [[40, 30], "what is it?"]}]
    for record, (line, expected) in zip(records[1:-1], BAD.items(), strict=True):
        assert expected in record["error"], line[:50]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", '{"a": [0, 2e400]}'])
@pytest.mark.parametrize("name", ["n", "image", "text"])
def test_a_number_that_no_json_has_costs_its_line_alone(tmp_path, name, number):
    line = b'{"image": "photo.jpg", "text": "a", "%s": %s}' % (name.encode(), number.encode())
    (_, bad, good) = answer(tmp_path, b"\n".join([GOOD, line, GOOD.replace(b"}", b', "n": 1e300, "m": -0.5}')]))
    assert bad["error"].startswith("is no JSON (")
    assert "is no finite number" in bad["error"]
    assert good["input"] == json.loads(GOOD) | {"n": 1e300, "m": -0.5}
    assert good["answers"]
    assert not re.search("Infinity|NaN", (tmp_path / "out.jsonl").read_text().replace(bad["error"], ""))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_the_error_of_its_line(tmp_path, score):
    (tmp_path / "in.jsonl").write_bytes(b"{}\n{}\n")
    scores = iter([0.5, score])
    how = Answerer(lambda line: line, lambda rows: [[{"answer": "a", "score": next(scores)}] for _ in rows], 1)
    num_lines, errors = answer_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", how)
    assert num_lines == 2
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["answers"]
    assert second == {"line": 2, "input": {}, "error": errors[0].removeprefix("line 2: ")}
    assert "no finite number" in second["error"]
    with pytest.raises(DataError, match="no finite number"):
        encoded({"answers": [{"score": score}]})


def test_a_field_nested_to_any_depth_costs_its_line_alone(tmp_path):
    # Somewhere between, reading succeeds and writing, deeper in the stack, does not.
    depths = range(880, 1000)
    lines = [b'{"image": "photo.jpg", "text": "a", "id": ' + b"[" * depth + b"]" * depth + b"}" for depth in depths]
    records = answer(tmp_path, b"\n".join([GOOD, *lines, GOOD]))
    assert "answers" in records[0]
    assert "answers" in records[-1]
    for record in records:
        assert ("answers" in record) != ("error" in record)
        assert "error" not in record or "is nested too deeply" in record["error"]


def test_byte_order_marks_are_no_text_wherever_files_were_joined(tmp_path):
    mark = b"\xef\xbb\xbf"
    records = answer(tmp_path, mark + GOOD + b"\r\n" + mark + b"\n" + mark + GOOD + b"\n  \n")
    assert [record["line"] for record in records] == [1, 3]
    assert all("answers" in record for record in records)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_an_input_in_utf_16_is_refused(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / "in.jsonl").write_bytes((mark + GOOD.decode() + "\n").encode(encoding))
    with pytest.raises(ConfigError, match="is UTF-16; save it as UTF-8"):
        count_lines(tmp_path / "in.jsonl")
