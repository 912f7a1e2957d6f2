"""VQAv2: questions and answers joined by image, and the vocabulary of the answers."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.data.formats.conftest import convert, fault_of, lose, set_at, write_json
from unimo3.data.formats.vqav2 import answer_vocabulary, normalized_choices

QUESTIONS = {
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through? ", "question_id": 458752000},
        {"image_id": 9, "question": "¿Qué es?", "question_id": 9000},
        {"image_id": 458752, "question": "What position?", "question_id": 458752001},
    ]
}


def note(image: int, question: int, *answers: str) -> dict:
    return {
        "question_id": question, "image_id": image, "question_type": "what", "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)
        ],
    }  # fmt: skip


NOTES = {
    "annotations": [
        note(458752, 458752001, "Pitcher.", "catcher"),
        note(458752, 458752000, "net"),
        note(9, 9000, "net", "", "two"),
    ]
}


def write_source(root: Path, bom: bool = False) -> Path:
    for year in ("train2014", "val2014"):
        write_json(root / f"v2_OpenEnded_mscoco_{year}_questions.json", QUESTIONS, bom)
        write_json(root / f"v2_mscoco_{year}_annotations.json", NOTES, bom)
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


def test_a_granularity_is_kept_and_a_question_type_may_be_missing(tmp_path):
    write_source(tmp_path)
    notes = lose("annotations", 2, "question_type")(set_at("annotations", 2, "granularity", value="fine")(NOTES))
    write_json(tmp_path / "v2_mscoco_train2014_annotations.json", notes)
    (entry,) = convert("vqav2", tmp_path).split("train")[1].content["questions"]
    assert (entry["granularity"], entry["question_type"]) == ("fine", "")


QUESTION_FAULTS = [
    (lose("questions"), ": field 'questions' is missing; list expected"),
    (lose("questions", 1, "question_id"), ": questions[1]: field 'question_id' is missing; int expected"),
    (
        set_at("questions", 1, "question_id", value=7),
        ": questions[1]: question_id 7 has no annotation in v2_mscoco_train2014_annotations.json; use one release",
    ),
    (lose("questions", 1, "image_id"), ": questions[1]: field 'image_id' is missing; int expected"),
    (set_at("questions", 2, "question", value=""), ": questions[2]: field 'question' is empty; remove the record"),
]


@pytest.mark.parametrize(("change", "expected"), QUESTION_FAULTS, ids=[expected for _, expected in QUESTION_FAULTS])
def test_a_faulty_field_of_a_question_is_named(tmp_path, change, expected):
    path = write_json(write_source(tmp_path) / "v2_OpenEnded_mscoco_train2014_questions.json", change(QUESTIONS))
    assert re.match(re.escape(f"{path}{expected}"), fault_of("vqav2", tmp_path))


NOTE_FAULTS = [
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
    (lose("annotations", 0, "answer_type"), ": annotations[0]: field 'answer_type' is missing; str expected"),
]


@pytest.mark.parametrize(("change", "expected"), NOTE_FAULTS, ids=[expected for _, expected in NOTE_FAULTS])
def test_a_faulty_field_of_an_annotation_is_named(tmp_path, change, expected):
    path = write_json(write_source(tmp_path) / "v2_mscoco_train2014_annotations.json", change(NOTES))
    assert re.match(re.escape(f"{path}{expected}"), fault_of("vqav2", tmp_path))


def test_the_vocabulary_holds_frequent_answers_by_count_and_then_by_alphabet():
    counts = Counter({"yes": 4, "no": 4, "dog": 9, "cat": 3})
    assert answer_vocabulary(counts, 4) == ["dog", "no", "yes"]
    assert answer_vocabulary(counts, 10) == []


def test_choices_are_counted_as_the_metric_reads_them(tmp_path):
    sample = convert("vqav2", write_source(tmp_path)).split("train")[0]
    assert normalized_choices(sample) == ["net", "pitcher"]


def test_all_that_the_toy_writes_is_read(drawn):
    read = convert("vqav2", drawn / "vqav2", drawn / "coco")
    assert {split for split, _ in read.samples} == {"train", "val"}
    assert all(file.is_file() for _, sample in read.samples for file in sample.images)
