"""VQAv2: questions and answers joined by image, test questions without answers, and the vocabulary of the answers."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import convert as prepare_shards
from tests.data.conftest import draw_jpeg
from tests.data.formats.conftest import convert, error_of, lose, set_at, write_json
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.formats.vqav2 import answer_vocabulary, normalized_choices
from unimo3.data.index import ShardIndex
from unimo3.data.order import Unit
from unimo3.data.samples import VqaSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform

QUESTIONS = {
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through? ", "question_id": 458752000},
        {"image_id": 9, "question": "¿Qué es?", "question_id": 9000},
        {"image_id": 458752, "question": "What position?", "question_id": 458752001},
    ]
}


def note(image: int, question: int, *answers: str) -> dict:
    return {
        "question_id": question,
        "image_id": image,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)
        ],
    }


NOTES = {
    "annotations": [
        note(458752, 458752001, "Pitcher.", "catcher"),
        note(458752, 458752000, "net"),
        note(9, 9000, "net", "", "two"),
    ]
}


# As published: test-dev's questions are some of test's.
TEST_QUESTIONS = {
    "questions": [
        {"image_id": 262144, "question": "Is the ball flying towards the batter?", "question_id": 262144000},
        {"image_id": 1, "question": " What is it? ", "question_id": 1000},
        {"image_id": 262144, "question": "What sport is this?", "question_id": 262144005},
    ]
}
TEST_DEV_QUESTIONS = {"questions": TEST_QUESTIONS["questions"][2:]}


def write_source(root: Path, bom: bool = False) -> Path:
    for year in ("train2014", "val2014"):
        write_json(root / f"v2_OpenEnded_mscoco_{year}_questions.json", QUESTIONS, bom)
        write_json(root / f"v2_mscoco_{year}_annotations.json", NOTES, bom)
    return root


def write_test_questions(root: Path, splits: tuple[str, ...] = ("test", "test-dev"), bom: bool = False) -> Path:
    """Add the questions of test splits to a source; their images are not drawn."""
    for split in splits:
        questions = {"test": TEST_QUESTIONS, "test-dev": TEST_DEV_QUESTIONS}[split]
        write_json(root / f"v2_OpenEnded_mscoco_{split}2015_questions.json", questions, bom)
    return root


def test_questions_and_answers_are_gathered_by_image(tmp_path):
    read = convert("vqav2", write_source(tmp_path, bom=True), tmp_path / "images")
    assert [(split, sample.key) for split, sample in read.samples] == [
        (split, key) for split in ("train", "val") for key in ("000000458752", "000000000009")
    ]
    sample = read.split("val")[0]
    common = {"answer_type": "other", "question_type": "what"}
    assert sample.images == (tmp_path / "images" / "val2014" / "COCO_val2014_000000458752.jpg",)
    assert sample.content == {
        "image_id": 458752,
        "questions": [
            common
            | {
                "question_id": 458752000,
                "question": "What is this photo taken looking through?",
                "answers": ["net"],
                "multiple_choice_answer": "net",
            },
            common
            | {
                "question_id": 458752001,
                "question": "What position?",
                "answers": ["Pitcher.", "catcher"],
                "multiple_choice_answer": "Pitcher.",
            },
        ],
    }
    assert read.split("train")[1].content["questions"][0]["answers"] == ["net", "", "two"]
    assert not read.omitted


def test_a_granularity_is_copied_and_a_question_type_may_be_missing(tmp_path):
    write_source(tmp_path)
    notes = lose("annotations", 2, "question_type")(set_at("annotations", 2, "granularity", value="fine")(NOTES))
    write_json(tmp_path / "v2_mscoco_train2014_annotations.json", notes)
    (entry,) = convert("vqav2", tmp_path).split("train")[1].content["questions"]
    assert (entry["granularity"], entry["question_type"]) == ("fine", "")


QUESTION_ERRORS = [
    (lose("questions"), ": field 'questions' is missing; list expected"),
    (lose("questions", 1, "question_id"), ": questions[1]: field 'question_id' is missing; int expected"),
    (
        set_at("questions", 1, "question_id", value=7),
        ": questions[1]: question_id 7 has no annotation in v2_mscoco_train2014_annotations.json; use one release",
    ),
    (lose("questions", 1, "image_id"), ": questions[1]: field 'image_id' is missing; int expected"),
    (set_at("questions", 2, "question", value=""), ": questions[2]: field 'question' is empty; remove the record"),
    (
        set_at("questions", 2, "question_id", value=458752000),
        ": questions[2]: question_id 458752000 is that of questions[0] too; ids are unique in a split, remove one",
    ),
]


@pytest.mark.parametrize(("change", "expected"), QUESTION_ERRORS, ids=[expected for _, expected in QUESTION_ERRORS])
def test_a_bad_field_of_a_question_is_named(tmp_path, change, expected):
    path = write_json(write_source(tmp_path) / "v2_OpenEnded_mscoco_train2014_questions.json", change(QUESTIONS))
    assert re.match(re.escape(f"{path}{expected}"), error_of("vqav2", tmp_path))


NOTE_ERRORS = [
    (lose("annotations"), ": field 'annotations' is missing; list expected"),
    (lose("annotations", 0, "question_id"), ": annotations[0]: field 'question_id' is missing; int expected"),
    (lose("annotations", 0, "image_id"), ": annotations[0]: field 'image_id' is missing; int expected"),
    (
        set_at("annotations", 2, "image_id", value=10),
        ": annotations[2]: field 'image_id' is 10, v2_OpenEnded_mscoco_train2014_questions.json has 9 for question_id "
        "9000; use one release",
    ),
    (lose("annotations", 1, "answers"), ": annotations[1]: field 'answers' is missing; list expected"),
    (set_at("annotations", 1, "answers", value=[]), ": annotations[1]: field 'answers' is empty; every question needs"),
    (
        lose("annotations", 0, "answers", 1, "answer"),
        ": annotations[0].answers[1]: field 'answer' is missing; str expected",
    ),
    (
        lose("annotations", 0, "multiple_choice_answer"),
        ": annotations[0]: field 'multiple_choice_answer' is missing; str expected",
    ),
    (
        set_at("annotations", 1, "question_id", value=458752001),
        ": annotations[1]: question_id 458752001 has another annotation before it; remove one of them",
    ),
    (lose("annotations", 0, "answer_type"), ": annotations[0]: field 'answer_type' is missing; str expected"),
]


@pytest.mark.parametrize(("change", "expected"), NOTE_ERRORS, ids=[expected for _, expected in NOTE_ERRORS])
def test_a_bad_field_of_an_annotation_is_named(tmp_path, change, expected):
    path = write_json(write_source(tmp_path) / "v2_mscoco_train2014_annotations.json", change(NOTES))
    assert re.match(re.escape(f"{path}{expected}"), error_of("vqav2", tmp_path))


@pytest.mark.parametrize("year", ["train2014", "val2014"])
def test_an_annotation_without_a_question_is_named(tmp_path, year):
    path = write_source(tmp_path) / f"v2_OpenEnded_mscoco_{year}_questions.json"
    write_json(path, {"questions": QUESTIONS["questions"][:1]})
    error = error_of("vqav2", tmp_path)
    assert error.startswith(
        f"{tmp_path}/v2_mscoco_{year}_annotations.json: 2 annotations have no question in {path.name}"
    )
    write_json(path, {"questions": []})
    assert error_of("vqav2", tmp_path) == f"{path}: has no question; download it again"


def test_the_vocabulary_orders_frequent_answers_by_count_then_alphabet():
    counts = Counter({"yes": 4, "no": 4, "dog": 9, "cat": 3})
    assert answer_vocabulary(counts, 4) == ["dog", "no", "yes"]
    assert answer_vocabulary(counts, 10) == []


def test_choices_are_counted_as_the_metric_reads_them(tmp_path):
    sample = convert("vqav2", write_source(tmp_path)).split("train")[0]
    assert normalized_choices(sample) == ["net", "pitcher"]


def test_questions_without_answers_have_no_choices(tmp_path):
    read = convert("vqav2", write_test_questions(write_source(tmp_path)))
    assert [normalized_choices(sample) for sample in read.split("test")] == [[], []]
    assert [normalized_choices(sample) for sample in read.split("val")] == [["net", "pitcher"], ["net"]]


def test_test_questions_are_read_separately_from_those_with_answers(tmp_path):
    source, images = write_test_questions(write_source(tmp_path / "source"), bom=True), tmp_path / "images"
    read, plain = convert("vqav2", source, images), convert("vqav2", write_source(tmp_path / "plain"), images)
    assert read.samples[:4] == plain.samples
    file = images / "test2015" / "COCO_test2015_000000262144.jpg"
    asked = [
        {"question_id": 262144000, "question": "Is the ball flying towards the batter?"},
        {"question_id": 262144005, "question": "What sport is this?"},
    ]
    first, other = read.split("test")
    assert (first.key, first.images) == ("000000262144", (file,))
    assert first.content == {"image_id": 262144, "questions": asked}
    assert (other.key, other.images) == ("000000000001", (images / "test2015" / "COCO_test2015_000000000001.jpg",))
    assert other.content == {"image_id": 1, "questions": [{"question_id": 1000, "question": "What is it?"}]}
    (part,) = read.split("test-dev")
    # Its images are test's.
    assert (part.key, part.images) == ("000000262144", (file,))
    assert part.content == {"image_id": 262144, "questions": asked[1:]}
    assert len(read.samples) == 4 + 2 + 1
    assert not read.omitted


@pytest.mark.parametrize("splits", [(), ("test",), ("test-dev",)])
def test_a_test_split_is_read_only_if_its_questions_are_there(tmp_path, splits):
    read = convert("vqav2", write_test_questions(write_source(tmp_path), splits))
    assert {split for split, _ in read.samples} == {"train", "val", *splits}


@pytest.mark.parametrize("name", ["v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"])
@pytest.mark.parametrize("year", ["train2014", "val2014"])
def test_train_and_val_are_needed_with_the_tests(tmp_path, year, name):
    path = write_test_questions(write_source(tmp_path)) / name.format(year)
    path.unlink()
    assert error_of("vqav2", tmp_path).startswith(f"{path}: cannot be read (No such file or directory)")


TEST_ERRORS = [
    (lose("questions"), ": field 'questions' is missing; list expected"),
    (lose("questions", 0, "question_id"), ": questions[0]: field 'question_id' is missing; int expected"),
    (lose("questions", 0, "image_id"), ": questions[0]: field 'image_id' is missing; int expected"),
    (set_at("questions", 0, "question", value=" "), ": questions[0]: field 'question' is empty; remove the record"),
]


@pytest.mark.parametrize("split", ["test", "test-dev"])
@pytest.mark.parametrize(("change", "expected"), TEST_ERRORS, ids=[expected for _, expected in TEST_ERRORS])
def test_a_bad_field_of_a_test_question_is_named(tmp_path, split, change, expected):
    path = write_test_questions(write_source(tmp_path)) / f"v2_OpenEnded_mscoco_{split}2015_questions.json"
    write_json(path, change(json.loads(path.read_text())))
    assert re.match(re.escape(f"{path}{expected}"), error_of("vqav2", tmp_path))


# Test questions in shards.


@pytest.fixture(scope="module")
def source_with_tests(source, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tests") / "source"
    shutil.copytree(source, root)
    (root / "test2015").mkdir()
    for image in (1, 262144):
        (root / "test2015" / f"COCO_test2015_{image:012d}.jpg").write_bytes(draw_jpeg(image))
    return write_test_questions(root)


def arguments_of(source: Path, out: Path) -> list[str]:
    """The arguments of the fixture `vqav2`."""
    return ["vqav2", "--src", str(source), "--out", str(out), "--shard-size", "4", "--min-answer-count", "3"]


@pytest.fixture(scope="module")
def shards_with_tests(source_with_tests, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tests") / "shards"
    assert prepare_shards(*arguments_of(source_with_tests, out)) == 0
    return out


def questions_in(folder: Path) -> list[dict]:
    index = ShardIndex(folder)
    return [
        question
        for shard, size in enumerate(index.samples_per_shard)
        for sample in range(size)
        for question in json.loads(index.read(shard, sample)["json"])["questions"]
    ]


def test_test_splits_get_separate_shards_and_change_nothing_else(vqav2, shards_with_tests):
    assert sorted(path.name for path in vqav2.iterdir()) == [".unimo3-shards", "answers.json", "train", "val"]
    assert sorted(path.name for path in shards_with_tests.iterdir()) == [
        ".unimo3-shards",
        "answers.json",
        "test",
        "test-dev",
        "train",
        "val",
    ]
    for path in (path for path in vqav2.rglob("*") if path.is_file()):
        assert (shards_with_tests / path.relative_to(vqav2)).read_bytes() == path.read_bytes(), path
    assert questions_in(shards_with_tests / "test") == [
        {"question_id": 262144000, "question": "Is the ball flying towards the batter?"},
        {"question_id": 262144005, "question": "What sport is this?"},
        {"question_id": 1000, "question": "What is it?"},
    ]
    assert questions_in(shards_with_tests / "test-dev") == [
        {"question_id": 262144005, "question": "What sport is this?"}
    ]
    assert ShardIndex(shards_with_tests / "test").read(0, 0)["jpg"] == draw_jpeg(262144)
    assert ShardIndex(shards_with_tests / "test-dev").read(0, 0)["jpg"] == draw_jpeg(262144)


def test_test_questions_reach_the_model_with_targets_of_zero(shards_with_tests, coco):
    answers = AnswerVocabulary.load(shards_with_tests / "answers.json")
    tokenizer, index = load_tokenizer(str(coco / "tokenizer")), ShardIndex(shards_with_tests / "test")
    samples = VqaSamples(index, tokenizer, 16, ImageTransform(32), answers, 0)
    assert samples.units_per_shard == [3]
    for number, identity in enumerate((262144000, 262144005, 1000)):
        inputs = samples.build(Unit(0, 0, number))
        assert inputs["question"]["question_id"] == identity
        assert np.array_equal(inputs["targets"], np.zeros(len(answers), np.float32))


def test_a_test_question_without_an_image_is_rejected(source_with_tests, tmp_path, capfd):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source_with_tests, source)
    missing = source / "test2015" / "COCO_test2015_000000262144.jpg"
    missing.unlink()
    # test-dev would be left empty.
    (source / "v2_OpenEnded_mscoco_test-dev2015_questions.json").unlink()
    assert prepare_shards(*arguments_of(source, out)) == 78
    assert f"1 of 2 records of test cannot be used (such as {missing}:" in capfd.readouterr().err
    assert not out.exists()
    assert prepare_shards(*arguments_of(source, out), "--max-reject-ratio", "0.5") == 0
    (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert reject == {
        "split": "test",
        "key": "000000262144",
        "image": str(missing),
        "reason": "cannot be read (No such file or directory)",
        "ids": [262144000, 262144005],
    }
    assert ShardIndex(out / "test").missing_ids == [262144000, 262144005]
    assert [question["question_id"] for question in questions_in(out / "test")] == [1000]
    # By whatever name it is indexed again, it is the split that is submitted.
    (out / "test").rename(out / "holdout")
    assert prepare_shards("index", "--src", str(out / "holdout")) == 0
    assert ShardIndex(out / "holdout").missing_ids == [262144000, 262144005]
    (error,) = DataArgs(train=str(out / "holdout")).shard_errors("questions")
    assert "is the split test of vqav2, which is for evaluation only" in error


def test_all_that_the_toy_writes_is_read(drawn):
    read = convert("vqav2", drawn / "vqav2", drawn / "coco")
    assert {split for split, _ in read.samples} == {"train", "val"}
    assert all(file.is_file() for _, sample in read.samples for file in sample.images)
