"""VQAv2, questions about COCO's images, and the vocabulary of its answers.

    SOURCE/v2_OpenEnded_mscoco_{train,val}2014_questions.json, SOURCE/v2_mscoco_{train,val}2014_annotations.json
    IMAGES/train2014/, IMAGES/val2014/

Source: https://visualqa.org/download.html.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimo3.data.answers import normalize_answer
from unimo3.data.formats.record import Sample, field, read_json, text
from unimo3.errors import DataError

_YEARS = {"train": "train2014", "val": "val2014"}


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an image, with all its ``questions`` and their answers; nothing is left out."""
    for split, year in _YEARS.items():
        path = source / f"v2_OpenEnded_mscoco_{year}_questions.json"
        questions = field(read_json(path, dict), "questions", path, list)
        notes = _read_annotations(source / f"v2_mscoco_{year}_annotations.json")
        of_image: dict[int, list[dict[str, Any]]] = {}
        for number, question in enumerate(questions):
            where = f"{path}: questions[{number}]"
            identity = field(question, "question_id", where, int)
            if identity not in notes:
                raise DataError(
                    f"{where}: question_id {identity} has no annotation in v2_mscoco_{year}_annotations.json; use one "
                    "release"
                )
            note_where, note = notes[identity]
            image = field(question, "image_id", where, int)
            if field(note, "image_id", note_where, int) != image:
                raise DataError(
                    f"{note_where}: field 'image_id' is {note['image_id']}, {path.name} has {image} for question_id "
                    f"{identity}; use one release"
                )
            asked = {"question_id": identity, "question": text(question, "question", where)}
            of_image.setdefault(image, []).append(asked | _answers(note, note_where))
        for image, entries in of_image.items():
            file = images / year / f"COCO_{year}_{image:012d}.jpg"
            yield split, Sample(f"{image:012d}", (file,), {"image_id": image, "questions": entries})


def answer_vocabulary(counts: Counter[str], min_count: int) -> list[str]:
    """Answers given at least `min_count` times, most frequent first, then by alphabet."""
    frequent = [(answer, count) for answer, count in counts.items() if count >= min_count]
    return [answer for answer, _ in sorted(frequent, key=lambda entry: (-entry[1], entry[0]))]


def normalized_choices(sample: Sample) -> list[str]:
    """The normalised majority answers of a sample's questions."""
    return [normalize_answer(question["multiple_choice_answer"]) for question in sample.content["questions"]]


def _read_annotations(path: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    notes = {}
    for number, note in enumerate(field(read_json(path, dict), "annotations", path, list)):
        where = f"{path}: annotations[{number}]"
        notes[field(note, "question_id", where, int)] = (where, note)
    return notes


def _answers(note: dict[str, Any], where: str) -> dict[str, Any]:
    answers = [
        field(answer, "answer", f"{where}.answers[{i}]", str)
        for i, answer in enumerate(field(note, "answers", where, list))
    ]
    if not answers:
        raise DataError(f"{where}: field 'answers' is empty; every question needs at least one")
    entry = {
        "answers": answers,
        "multiple_choice_answer": field(note, "multiple_choice_answer", where, str),
        "answer_type": field(note, "answer_type", where, str),
        "question_type": note.get("question_type", ""),
    }
    if "granularity" in note:
        entry["granularity"] = note["granularity"]
    return entry
