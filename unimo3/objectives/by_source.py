"""Losses of each source of a mixture, to see which one is hard, learned or damaged.

A mean over ranks and micro-batches of means would weigh rows differently where ranks read different numbers of rows of
a source. So sums and counts are reported, and divided when they are logged.

Source: none.
"""

# Shapes: B rows of a batch.

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_SUM, _COUNT = "sum of ", "count of "


def sums_by_source(rows: "Tensor", source: "Tensor", names: Sequence[str], metric: str) -> "dict[str, Tensor]":
    """Sum and number of a metric's values of each source, as scalars for `means_by_source`.

    Args:
        rows: [B, 2], for each row the sum of its values and their number.
        source: [B], the number of each row's source.
        names: of the sources.
    """
    totals = rows.new_zeros(len(names), 2).index_add_(0, source, rows)
    return {
        f"{what}{metric}/{name}": totals[number, column]
        for number, name in enumerate(names)
        for column, what in enumerate((_SUM, _COUNT))
    }


def means_by_source(means: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics in which a sum and a count stand for their ratio; None for a source that no rank has read."""
    result = {}
    for name, value in means.items():
        if name.startswith(_SUM):
            count = means[_COUNT + name.removeprefix(_SUM)]
            result[name.removeprefix(_SUM)] = value / count if count else None
        elif not name.startswith(_COUNT):
            result[name] = value
    return result
