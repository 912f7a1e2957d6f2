"""How well questions can be answered without the picture: the bar a vision-language model has to pass.

A guess is the most frequent majority answer in training to the same text, if it came often enough there, else to the
same question type, else over all. How often is often enough is chosen for each group of questions so that the guess
scores best on the questions it is measured on: the bar is not set too low. Scores are the official accuracy.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from unimo3.metrics.groups import accuracy_by_group
from unimo3.metrics.vqa import vqa_accuracy

Record = Mapping[str, Any]

_LEAST_COUNTS = (1, 3, 10, 30, 100, 10**9)


class BlindGuesser:
    """Learns the best guess for each question text.

    Args:
        questions: with ``question``, ``question_type`` and ``multiple_choice_answer``.
    """

    def __init__(self, questions: Iterable[Record]):
        by_text: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question in questions:
            answer = question["multiple_choice_answer"]
            by_text[question["question"]][answer] += 1
            by_type[question["question_type"]][answer] += 1
            overall[answer] += 1
        self._by_text = {text: (counts.total(), _most_frequent(counts)) for text, counts in by_text.items()}
        self._by_type = {kind: _most_frequent(counts) for kind, counts in by_type.items()}
        self._overall = _most_frequent(overall)

    def guess(self, question: Record, least_count: int = 1) -> str:
        """The best guess from the text alone; a text seen fewer than `least_count` times is taken as new."""
        count, answer = self._by_text.get(question["question"], (0, ""))
        if count >= least_count:
            return answer
        return self._by_type.get(question["question_type"], self._overall)

    def accuracy(self, questions: Iterable[Record]) -> dict[str, float]:
        """Official accuracy of the guesses: ``overall`` and for each ``granularity``."""
        asked = list(questions)
        best: dict[str, float] = {}
        for least_count in _LEAST_COUNTS:
            scores = accuracy_by_group(
                (question.get("granularity", ""), vqa_accuracy(self.guess(question, least_count), question["answers"]))
                for question in asked
            )
            best = {group: max(score, best.get(group, 0.0)) for group, score in scores.items()}
        return best


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""
