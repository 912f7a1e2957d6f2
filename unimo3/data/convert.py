"""Public data sets' own files -> samples.

Each converter reads one data set's real field names and yields (split, sample). To add a data set, write a function
and enter it in `CONVERTERS`.

Source: the files of https://cs.stanford.edu/people/karpathy/deepimagesent (COCO) and https://visualqa.org (VQAv2).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimo3.data.answers import normalize_answer
from unimo3.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One image and what is said or asked of it.

    Attributes:
        key: unique in its split, without dots.
        image: file of the image.
        content: what goes into the sample's ``json``; has ``image_id``, and ``captions`` or ``questions``.
    """

    key: str
    image: Path
    content: dict[str, Any]


_COCO_SPLITS = ("train", "restval", "val", "test")
Converter = Callable[[Path, Path], Iterator[tuple[str, Sample]]]


def convert_coco(source: Path, images: Path) -> Iterator[tuple[str, Sample]]:
    """``dataset_coco.json`` of Karpathy's splits; ``restval`` joins training."""
    path = source / "dataset_coco.json"
    for number, image in enumerate(_field(_read_json(path), "images", path, list)):
        where = f"{path}: images[{number}]"
        split = _field(image, "split", where, str)
        identity = _field(image, "cocoid", where, int)
        if split not in _COCO_SPLITS:
            raise DataError(f"{where}: field 'split' is {split!r}; one of {', '.join(_COCO_SPLITS)} expected")
        file = images / _field(image, "filepath", where, str) / _field(image, "filename", where, str)
        sentences = _field(image, "sentences", where, list)
        texts = [_text(s, "raw", f"{where}.sentences[{i}]") for i, s in enumerate(sentences)]
        if not texts:
            raise DataError(f"{where}.sentences: is empty; every image needs at least one caption")
        content = {"image_id": identity, "captions": texts}
        yield "train" if split == "restval" else split, Sample(f"{identity:012d}", file, content)


def convert_vqav2(source: Path, images: Path) -> Iterator[tuple[str, Sample]]:
    """``v2_OpenEnded_mscoco_{train,val}2014_questions.json`` and ``v2_mscoco_{train,val}2014_annotations.json``."""
    for split, year in (("train", "train2014"), ("val", "val2014")):
        path = source / f"v2_OpenEnded_mscoco_{year}_questions.json"
        questions = _field(_read_json(path), "questions", path, list)
        notes_path = source / f"v2_mscoco_{year}_annotations.json"
        notes = {}
        for number, note in enumerate(_field(_read_json(notes_path), "annotations", notes_path, list)):
            notes[_field(note, "question_id", f"{notes_path}: annotations[{number}]", int)] = (number, note)
        of_image: dict[int, list[dict[str, Any]]] = {}
        for number, question in enumerate(questions):
            where = f"{path}: questions[{number}]"
            identity = _field(question, "question_id", where, int)
            if identity not in notes:
                raise DataError(
                    f"{where}: question_id {identity} has no annotation in {notes_path.name}; use one release"
                )
            note_number, note = notes[identity]
            note_where = f"{notes_path}: annotations[{note_number}]"
            answers = [
                _field(answer, "answer", f"{note_where}.answers[{i}]", str)
                for i, answer in enumerate(_field(note, "answers", note_where, list))
            ]
            if not answers:
                raise DataError(f"{note_where}: field 'answers' is empty; every question needs at least one")
            if _field(note, "image_id", note_where, int) != _field(question, "image_id", where, int):
                raise DataError(
                    f"{note_where}: field 'image_id' is {note['image_id']}, {path.name} has {question['image_id']} for "
                    f"question_id {identity}; use one release"
                )
            entry = {
                "question_id": identity,
                "question": _text(question, "question", where),
                "answers": answers,
                "multiple_choice_answer": _field(note, "multiple_choice_answer", note_where, str),
                "answer_type": _field(note, "answer_type", note_where, str),
                "question_type": note.get("question_type", ""),
            }
            if "granularity" in note:
                entry["granularity"] = note["granularity"]
            of_image.setdefault(_field(question, "image_id", where, int), []).append(entry)
        for image, asked in of_image.items():
            file = images / year / f"COCO_{year}_{image:012d}.jpg"
            yield split, Sample(f"{image:012d}", file, {"image_id": image, "questions": asked})


CONVERTERS: dict[str, Converter] = {"coco": convert_coco, "vqav2": convert_vqav2}


def answer_vocabulary(counts: Counter[str], min_count: int) -> list[str]:
    """Answers given at least `min_count` times, most frequent first, then by alphabet."""
    frequent = [(answer, count) for answer, count in counts.items() if count >= min_count]
    return [answer for answer, _ in sorted(frequent, key=lambda entry: (-entry[1], entry[0]))]


def normalized_choices(sample: Sample) -> list[str]:
    """The normalised majority answers of a sample's questions."""
    return [normalize_answer(question["multiple_choice_answer"]) for question in sample.content["questions"]]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); --src must name the data set's folder") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); download it again") from error
    return content


def _field(record: Any, name: str, where: str | Path, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        state = "is missing" if value is None else f"is {value!r}"
        raise DataError(f"{where}: field '{name}' {state}; {kind.__name__} expected, as in the public release")
    return value


def _text(record: Any, name: str, where: str) -> str:
    text: str = _field(record, name, where, str).strip()
    if not text:
        raise DataError(f"{where}: field '{name}' is empty; remove the record or give it a text")
    return text
