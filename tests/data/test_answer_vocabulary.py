"""The file of VQA's answers: read in UTF-8 of any make and any locale, or refused with one message that names it."""

import json

import pytest

from unimo3.data.answers import AnswerVocabulary
from unimo3.errors import DataError

ANSWERS = ["yes", "déjà 犬", "two\r\nlines", "2"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("is_escaped", [False, True])
def test_an_editors_form_of_the_file_has_the_same_answers(tmp_path, monkeypatch, encoding, line_end, is_escaped):
    monkeypatch.setenv("LC_ALL", "C")
    path = tmp_path / "answers.json"
    AnswerVocabulary(ANSWERS).save(path)
    assert AnswerVocabulary.load(path).answers == ANSWERS
    text = json.dumps({"answers": ANSWERS}, ensure_ascii=is_escaped, indent=1).replace("\n", line_end)
    path.write_bytes(text.encode(encoding))
    assert AnswerVocabulary.load(path).answers == ANSWERS


def test_half_of_a_surrogate_pair_is_stored_and_scored_as_a_question_mark(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"answers": ["a \ud83d", "b"]}))
    vocabulary = AnswerVocabulary.load(path)
    assert vocabulary.answers == ["a ?", "b"]
    vocabulary.save(path)
    assert AnswerVocabulary.load(path).answers == vocabulary.answers


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError: Expecting value"),
        (b'{"answers": ["yes"', "JSONDecodeError"),
        (b'["yes", "no"]', "TypeError"),
        (b'{"answer": ["yes"]}', "KeyError"),
        (b'{"answers": "yes"}', "TypeError: its answers are no list of texts"),
        (b'{"answers": ["yes", 2]}', "TypeError: its answers are no list of texts"),
        (b"[" * 100_000, "RecursionError"),
        ('{"answers": ["déjà"]}'.encode("latin-1"), "UnicodeDecodeError"),
        ('{"answers": ["yes"]}'.encode("utf-16"), "UnicodeDecodeError"),
        (b'{"answers": ["ye\0s"]}', "JSONDecodeError: Invalid control character"),
        (b'{"answers": []}', "lists no answers"),
        (b'{"answers": ["yes", "no", "yes"]}', "lists 'yes' 2 times"),
        (b'{"answers": ["\\ud83d", "\\udc36 ", "\\ude00"]}', r"lists '\?' 2 times"),
        (None, "FileNotFoundError"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_file_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: (is no answer vocabulary \()?{reason}"):
        AnswerVocabulary.load(path)
