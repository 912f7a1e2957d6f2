"""VQAv2, questions about COCO's images, and the vocabulary of its answers.

    SOURCE/v2_OpenEnded_mscoco_{train,val}2014_questions.json, SOURCE/v2_mscoco_{train,val}2014_annotations.json
    SOURCE/v2_OpenEnded_mscoco_{test,test-dev}2015_questions.json, each only if wanted
    IMAGES/train2014/, IMAGES/val2014/, IMAGES/test2015/ for both tests

Source: https://visualqa.org/download.html.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from unimo3.data.formats.record import Sample, field, read_json, text
from unimo3.errors import DataError
from unimo3.metrics.vqa import normalize_answer

# Our split, its questions, its images, whether its answers are published. Only the evaluation server knows the others.
_SPLITS = (
    ("train", "train2014", "train2014", True),
    ("val", "val2014", "val2014", True),
    ("test", "test2015", "test2015", False),
    ("test-dev", "test-dev2015", "test2015", False),
)


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an image, with all its ``questions``, those of train and val with their answers; nothing is skipped.

    A test split whose questions are not there is skipped: training needs none.
    """
    for split, part, folder, has_answers in _SPLITS:
        path = source / f"v2_OpenEnded_mscoco_{part}_questions.json"
        if not has_answers and not path.exists():
            continue
        questions = field(read_json(path, dict), "questions", path, list)
        if not questions:
            raise DataError(f"{path}: has no question; download it again")
        notes = _Annotations(source / f"v2_mscoco_{part}_annotations.json", path) if has_answers else None
        of_image: dict[int, list[dict[str, Any]]] = {}
        position_of: dict[int, int] = {}
        for number, question in enumerate(questions):
            where = f"{path}: questions[{number}]"
            identity = field(question, "question_id", where, int)
            first = position_of.setdefault(identity, number)
            if first != number:
                raise DataError(
                    f"{where}: question_id {identity} is that of questions[{first}] too; ids are unique in a split, "
                    "remove one of them"
                )
            image = field(question, "image_id", where, int)
            entry: dict[str, Any] = {"question_id": identity, "question": text(question, "question", where)}
            if notes is not None:
                entry |= notes.answers(identity, image, where)
            of_image.setdefault(image, []).append(entry)
        if notes is not None:
            notes.check_questions(position_of)
        for image, entries in of_image.items():
            file = images / folder / f"COCO_{folder}_{image:012d}.jpg"
            yield split, Sample(f"{image:012d}", (file,), {"image_id": image, "questions": entries})


def answer_vocabulary(counts: Counter[str], min_count: int) -> list[str]:
    """Answers with a count of at least `min_count`, most frequent first, then by alphabet."""
    frequent = [(answer, count) for answer, count in counts.items() if count >= min_count]
    return [answer for answer, _ in sorted(frequent, key=lambda entry: (-entry[1], entry[0]))]


def normalized_choices(sample: Sample) -> list[str]:
    """The normalized majority answers of a sample's questions, of those that have answers."""
    return [
        normalize_answer(question["multiple_choice_answer"])
        for question in sample.content["questions"]
        if "multiple_choice_answer" in question
    ]


class _Annotations:
    """The annotations of a split, by question.

    Args:
        path: of the annotations.
        questions: file they belong to, for messages.
    """

    def __init__(self, path: Path, questions: Path):
        self._path, self._questions = path, questions
        self._notes: dict[int, tuple[str, dict[str, Any]]] = {}
        for number, note in enumerate(field(read_json(path, dict), "annotations", path, list)):
            where = f"{path}: annotations[{number}]"
            identity = field(note, "question_id", where, int)
            if identity in self._notes:
                raise DataError(f"{where}: question_id {identity} has another annotation before it; remove one of them")
            self._notes[identity] = (where, note)

    def answers(self, question: int, image: int, where: str) -> dict[str, Any]:
        """The human answers to a question about an image.

        Args:
            where: position of the question, for messages.

        Raises:
            DataError: the question has no annotation, or one that does not fit it or lacks a field.
        """
        if question not in self._notes:
            raise DataError(f"{where}: question_id {question} has no annotation in {self._path.name}; use one release")
        note_where, note = self._notes[question]
        if field(note, "image_id", note_where, int) != image:
            raise DataError(
                f"{note_where}: field 'image_id' is {note['image_id']}, {self._questions.name} has {image} for "
                f"question_id {question}; use one release"
            )
        return _answers(note, note_where)

    def check_questions(self, questions: Collection[int]) -> None:
        """Refuse annotations without a question: results on a part of a split are not those of others.

        Raises:
            DataError: there is such an annotation.
        """
        lacking = sorted(self._notes.keys() - set(questions))
        if lacking:
            raise DataError(
                f"{self._path}: {len(lacking)} annotations have no question in {self._questions.name}, such as that of "
                f"question_id {lacking[0]}; use one release"
            )


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
        "question_type": field(note, "question_type", where, str) if "question_type" in note else "",
    }
    if "granularity" in note:
        entry["granularity"] = field(note, "granularity", where, str)
    return entry
