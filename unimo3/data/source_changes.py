"""What differs between the data sources of two stages of a training, from what their runs have recorded.

Source: none.
"""

from collections.abc import Sequence
from typing import Any

_SHORT = 12  # characters of a fingerprint
Facts = dict[str, Any]


def source_changes(before: Sequence[Facts], now: Sequence[Facts]) -> list[str]:
    """Sources that were added, removed, made again, or given another weight, one phrase each.

    Args:
        before: of each source what `DataArgs.facts` gives.
        now: the same of the later stage.
    """
    changes = []
    left = list(before)
    fractions_before, fractions = _fractions(before), _fractions(now)
    for source, fraction in zip(now, fractions, strict=True):
        same = [other for other in left if other["fingerprint"] == source["fingerprint"]]
        same = same or [other for other in left if _name(other) == _name(source)]
        if not same:
            changes.append(f"{_name(source)} added ({fraction:.4g} of the stream, index {_index(source)})")
            continue
        other = same[0]
        left.remove(other)
        if other["fingerprint"] != source["fingerprint"]:
            changes.append(f"{_name(source)} has index {_index(source)}, previously {_index(other)}")
        elif _name(other) != _name(source):
            changes.append(f"{_name(source)} was named {_name(other)}")
        before_fraction = fractions_before[list(before).index(other)]
        if f"{fraction:.4g}" != f"{before_fraction:.4g}":
            changes.append(f"{_name(source)} is {fraction:.4g} of the stream, previously {before_fraction:.4g}")
    return changes + [f"{_name(other)} removed" for other in left]


def _name(source: Facts) -> str:
    return f"{source['dataset']}/{source['split']}"


def _index(source: Facts) -> str:
    return f"{source['fingerprint'][:_SHORT]} of {source['samples']} samples"


def _fractions(sources: Sequence[Facts]) -> list[float]:
    total = sum(source["weight"] for source in sources)
    return [source["weight"] / total for source in sources]
