"""Mean scores by group of examples."""

from collections import defaultdict
from collections.abc import Iterable


def accuracy_by_group(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean score ``overall`` and for each non-empty group, sorted."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, score in scores:
        groups["overall"].append(score)
        if group:
            groups[group].append(score)
    return {group: sum(values) / len(values) for group, values in sorted(groups.items())}
