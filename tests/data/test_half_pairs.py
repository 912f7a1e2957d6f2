"""Half of a surrogate pair, which JSON can escape and no file can store: it becomes "?" wherever it is written."""

import json

import pytest

from tests.data.conftest import convert, write_source
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.formats.record import read_json, read_records
from unimo3.data.index import ShardIndex
from unimo3.errors import DataError

HIGH, LOW, PAIR = "a \ud83d", "\udc36 b", "\U0001f436"


@pytest.fixture
def source(tmp_path):
    """A source in which every text contains half a pair."""
    root = write_source(tmp_path / "source", num_images=6)

    def change(name, at):
        path = root / name
        content = json.loads(path.read_text())
        at(content)
        path.write_text(json.dumps(content))

    def set_captions(content):
        for image in content["images"]:
            image["sentences"] = [{"raw": text} for text in (HIGH, LOW, PAIR)]

    def set_answers(content):
        for note in content["annotations"]:
            note["multiple_choice_answer"] = HIGH
            note["answers"] = [{"answer": HIGH}] * 10

    def set_questions(content):
        for question in content["questions"]:
            question["question"] = f"is it {LOW}?"

    change("dataset_coco.json", set_captions)
    for year in ("train2014", "val2014"):
        change(f"v2_mscoco_{year}_annotations.json", set_answers)
        change(f"v2_OpenEnded_mscoco_{year}_questions.json", set_questions)
    return root


def test_captions_questions_and_answers_may_contain_it(source, tmp_path):
    out = tmp_path / "coco"
    assert convert("coco", "--src", str(source), "--out", str(out), "--tokenizer-vocab", "300") == 0
    assert json.loads(ShardIndex(out / "train").read(0, 0)["json"])["captions"] == ["a ?", "? b", PAIR]
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    out = tmp_path / "vqa"
    assert convert("vqav2", "--src", str(source), "--out", str(out), "--min-answer-count", "1") == 0
    assert AnswerVocabulary.load(out / "answers.json").answers == [""]
    (question, *_) = json.loads(ShardIndex(out / "train").read(0, 0)["json"])["questions"]
    assert (question["question"], question["answers"][0]) == ("is it ? b?", "a ?")


def test_a_file_name_that_contains_it_is_a_rejected_record(source, tmp_path):
    path = source / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][0]["filename"] = HIGH
    content["images"][1]["filepath"] = LOW
    path.write_text(json.dumps(content))
    out = tmp_path / "out"
    assert convert("coco", "--src", str(source), "--out", str(out), "--max-reject-ratio", "0.9") == 0
    rejects = [json.loads(line)["image"] for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [name.rpartition("source/")[2].partition("/")[0] for name in rejects] == ["train2014", "? b"]


def test_readers_replace_it_in_names_and_values_at_any_depth(tmp_path):
    record = {HIGH: [{"a": [LOW, 1, None]}, PAIR, "\\ud83d"]}
    expected = {"a ?": [{"a": ["? b", 1, None]}, PAIR, "\\ud83d"]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert read_json(tmp_path / "a.json", dict) == expected
    assert [value for _, value in read_records(tmp_path / "a.json")] == [expected]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": "\\ud83d", "b": ' + "[" * 990 + "]" * 990 + "}"])
def test_a_depth_that_cannot_be_read_is_an_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    for read in (lambda path: read_json(path, dict), lambda path: list(read_records(path))):
        with pytest.raises(DataError, match=r"is not JSON \("):
            read(tmp_path / "a.json")


def test_an_answer_vocabulary_can_be_saved_with_it(tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps({"answers": [HIGH, "déjà"]}))
    AnswerVocabulary.load(tmp_path / "answers.json").save(tmp_path / "saved.json")
    assert AnswerVocabulary.load(tmp_path / "saved.json").answers == ["a ?", "déjà"]
