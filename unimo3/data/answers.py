"""Answers of VQAv2: their vocabulary, and soft training targets."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimo3.errors import DataError
from unimo3.metrics.vqa import normalize_answer
from unimo3.versions import check_version

_VERSION = 1
# Training targets by how many of the ten gave an answer, as METER and its forerunners.
_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


class AnswerVocabulary:
    """The answers a model chooses among.

    Args:
        answers: normalized, in the order of the head's classes.
    """

    def __init__(self, answers: Sequence[str]):
        self.answers = list(answers)
        self._number = {answer: number for number, answer in enumerate(self.answers)}

    def __len__(self) -> int:
        return len(self.answers)

    def soft_targets(self, answers: Sequence[str]) -> np.ndarray:
        """[answers] float32: 0.3, 0.6, 0.9 or 1 for an answer of one, two, three or more people."""
        targets = np.zeros(len(self.answers), dtype=np.float32)
        for answer, count in Counter(normalize_answer(answer) for answer in answers).items():
            if answer in self._number:
                targets[self._number[answer]] = _SOFT_SCORES[min(count, 4)]
        return targets

    def save(self, path: Path) -> None:
        """Write as JSON."""
        text = json.dumps({"version": _VERSION, "answers": self.answers}, ensure_ascii=False, indent=0) + "\n"
        path.write_text(text, encoding="utf-8", errors="replace")

    def save_pretrained(self, save_directory: Path) -> None:
        """Write ``answers.json`` into a folder, next to what transformers' classes write there."""
        self.save(save_directory / "answers.json")

    @classmethod
    def load(cls, path: Path) -> "AnswerVocabulary":
        """Read what `save` wrote, in UTF-8 with or without a byte order mark; half a surrogate pair becomes "?".

        Raises:
            DataError: the file is missing or damaged, contains no answers, or one twice.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            check_version(path, content, (_VERSION,), kind=DataError)
            answers = content["answers"]
            if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
                raise TypeError("its answers are no list of texts")
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: is no answer vocabulary ({type(error).__name__}: {error}); python -m pretrain.prepare_shards "
                "vqav2 writes one next to its shards"
            ) from error
        if not answers:
            raise DataError(f"{path}: lists no answers; prepare the shards with a lower --min-answer-count")
        vocabulary = cls([answer.encode("utf-8", "replace").decode() for answer in answers])
        if len(vocabulary._number) < len(vocabulary):
            (repeated, count), *_ = Counter(vocabulary.answers).most_common(1)
            raise DataError(
                f"{path}: lists {repeated!r} {count} times, so its classes would share their questions; copy the file "
                "again, or prepare the shards again"
            )
        return vocabulary
