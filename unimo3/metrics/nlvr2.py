"""NLVR2's official metrics: accuracy, and consistency over a sentence's pairs of images.

Source: arXiv 1811.00491, and nlvr2/eval/metrics.py of https://github.com/lil-lab/nlvr.
"""

from collections.abc import Iterable

_PAIR_INDEX = 2
_NUM_PARTS = 4


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
