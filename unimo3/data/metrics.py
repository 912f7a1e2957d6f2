"""Metrics of predictions: VQAv2's and NLVR2's official ones, and means by group.

Recall is in `unimo3/training/retrieval/recall.py`; `unimo3/training/metrics.py` has what a run logs.

Source: VQA, arXiv 1505.00468, and https://visualqa.org/evaluation.html; NLVR2, arXiv 1811.00491, and
nlvr2/eval/metrics.py of https://github.com/lil-lab/nlvr.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from unimo3.data.answers import normalize_answer, strip_spaces

_PAIR_INDEX = 2
_NUM_PARTS = 4


def accuracy_by_group(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean score ``overall`` and for each non-empty group, sorted."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, score in scores:
        groups["overall"].append(score)
        if group:
            groups[group].append(score)
    return {group: sum(values) / len(values) for group, values in sorted(groups.items())}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official accuracy of one prediction against the (ten) human answers.

    The mean, over each answer omitted in turn, of min(1, matches among the others / 3). As in the official program,
    texts are normalized only where the human answers differ.
    """
    prediction, humans = strip_spaces(prediction), [strip_spaces(answer) for answer in answers]
    if len(set(humans)) > 1:
        prediction, humans = normalize_answer(prediction), [normalize_answer(answer) for answer in humans]
    num_matches = sum(human == prediction for human in humans)
    return sum(min(1.0, (num_matches - (human == prediction)) / 3) for human in humans) / len(humans)


def sentence_of(identifier: str) -> str:
    """The identifier of an NLVR2 sentence: an example's identifier, split-set-pair-sentence, without the pair.

    Raises:
        ValueError: it has not that form, or cannot be stored in a line ``identifier,label``.
    """
    parts = identifier.split("-")
    is_storable = "," not in identifier and identifier.isprintable() and identifier == identifier.strip()
    if len(parts) < _NUM_PARTS or not all(parts) or not is_storable:
        raise ValueError(
            f"field 'identifier' is {identifier!r}; split-set-pair-sentence expected, without commas, line ends and "
            "spaces around it"
        )
    return "-".join([*parts[:_PAIR_INDEX], *parts[_PAIR_INDEX + 1 :]])


def pair_metrics(judged: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """``accuracy``, the fraction of examples judged right, and ``consistency``, of sentences right for all their pairs.

    Args:
        judged: each example's identifier, and whether it was judged right; at least one.
    """
    all_right: dict[str, bool] = {}
    num_right = num_examples = 0
    for identifier, is_right in judged:
        sentence = sentence_of(identifier)
        all_right[sentence] = all_right.get(sentence, True) and is_right
        num_right += is_right
        num_examples += 1
    return {"accuracy": num_right / num_examples, "consistency": sum(all_right.values()) / len(all_right)}
