"""The sample order: a pure function of (seed, position), whatever the number of ranks, workers or micro-steps.

Epoch e permutes the shards, groups them in windows, and permutes the units inside each window; epochs follow each
other without a gap. Position p is a number of units since the beginning, so resuming is a seek. Global batch t is
positions [t G, (t + 1) G); nothing is dropped at an epoch's end. Step t reads global batch t, or a later one after
batches that the run skips.

Several sources are mixed by weight: each source has such a stream, and a window of the mixture contains units of each
source in proportion to its weight, in a permuted order.

Source: shard and shuffle-buffer shuffling as in WebDataset, made a function of the position.
"""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Units of a window of a mixture.
MIX_WINDOW = 1024


class Unit(NamedTuple):
    """One unit of the stream: its source's epoch, its shard, its number in that shard, and its source."""

    epoch: int
    shard: int
    unit: int
    source: int = 0


class SampleOrder:
    """Random access to the shuffled stream.

    Memory is 8 bytes a shard, 4 more for each of two epochs, and two windows of units. The first position of an epoch
    takes longer than the others, since the epoch's shards are permuted.

    Args:
        units_per_shard: how many units each shard has; shards may be uneven or empty.
        seed: of the run.
        window_shards: shards whose units are shuffled together.
    """

    def __init__(self, units_per_shard: Sequence[int] | np.ndarray, seed: int, window_shards: int):
        self._sizes = np.asarray(units_per_shard, dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self.num_units = int(self._sizes.sum())
        if self.num_units == 0:
            raise ValueError("units_per_shard: contains no units; an order needs at least one")
        if window_shards < 1:
            raise ValueError(f"window_shards: {window_shards}; at least 1 is needed")
        self._shards_of_epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._units_of_window = lru_cache(maxsize=2)(self._permute_window)

    def __getitem__(self, position: int) -> Unit:
        """The unit at a position, counted from 0 without end."""
        if position < 0:
            raise IndexError(f"position {position}: 0 or more is needed")
        epoch, offset = divmod(position, self.num_units)
        shards, ends = self._shards_of_epoch(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        start = 0 if window == 0 else int(ends[window - 1])
        local = int(self._units_of_window(epoch, window)[offset - start])
        members = shards[window * self._window_shards : (window + 1) * self._window_shards]
        member_ends = np.cumsum(self._sizes[members])
        member = int(np.searchsorted(member_ends, local, side="right"))
        return Unit(epoch, int(members[member]), local - (0 if member == 0 else int(member_ends[member - 1])))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order, and the number of units up to the end of each full window."""
        # Which type the numbers have does not change their order.
        shards = np.random.default_rng((self._seed, epoch, 0)).permutation(np.arange(len(self._sizes), dtype=np.int32))
        return shards, np.cumsum(self._sizes[shards])[self._window_shards - 1 :: self._window_shards].copy()

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        shards, _ = self._shards_of_epoch(epoch)
        members = shards[window * self._window_shards : (window + 1) * self._window_shards]
        rng = np.random.default_rng((self._seed, epoch, 1, window))
        return rng.permutation(int(self._sizes[members].sum()))


class _Segment(NamedTuple):
    """Windows of a mixture between which no source leaves it.

    Attributes:
        window: the first one.
        counts: units of each source before it.
        fractions: of each source; 0 of those that have left.
    """

    window: int
    counts: tuple[int, ...]
    fractions: tuple[Fraction, ...]

    def counts_before(self, window: int) -> list[int]:
        """Units of each source before a window, which is not before the segment."""
        units = (window - self.window) * MIX_WINDOW
        return [count + math.floor(units * part) for count, part in zip(self.counts, self.fractions, strict=True)]


class MixedOrder:
    """Several orders as one stream, by weight.

    After w windows, a source with the fraction s of the weight has given floor(w M s) units, where M is `MIX_WINDOW`.
    The number is at most one unit off w M s, and is known for any w without a loop over windows. With a limit of
    epochs, a source leaves the mixture before the window in which it would exceed the limit; the weights of the others
    stay.

    Args:
        orders: of the sources.
        weights: of each, above 0; only their ratios matter.
        seed: of the run.
        max_epochs: of each source. 0: no limit.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], seed: int, max_epochs: int = 0):
        if len(orders) != len(weights) or not orders:
            raise ValueError(f"weights: {len(weights)} for {len(orders)} orders; one each is needed")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights: {list(weights)}; finite numbers above 0 are needed")
        self._orders = orders
        # Exact, of the weights as written: in floats, a product with the number of a late window is inexact.
        exact = [Fraction(str(weight)) for weight in weights]
        self._segments = _segments(exact, [max_epochs * order.num_units for order in orders] if max_epochs else [])
        self._first_windows = [segment.window for segment in self._segments]
        self._seed = seed
        self._sources_of_window = lru_cache(maxsize=2)(self._permute_sources)

    @property
    def num_units(self) -> float:
        """Length of the stream: without a limit of epochs, infinite."""
        last = self._segments[-1]
        return math.inf if any(last.fractions) else sum(last.counts)

    def __getitem__(self, position: int) -> Unit:
        """The unit at a position, counted from 0."""
        if not 0 <= position < self.num_units:
            raise IndexError(f"position {position}: 0 or more, and below {self.num_units}, is needed")
        # Windows are M long on average, and none begins later than its number times M.
        window = position // MIX_WINDOW
        while sum(self._counts_before(window + 1)) <= position:
            window += 1
        starts = self._counts_before(window)
        sources, indices = self._sources_of_window(window)
        local = position - sum(starts)
        source = int(sources[local])
        return self._orders[source][starts[source] + int(indices[local])]._replace(source=source)

    def _counts_before(self, window: int) -> list[int]:
        """Units of each source before a window."""
        return self._segments[bisect.bisect_right(self._first_windows, window) - 1].counts_before(window)

    def _permute_sources(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a window its source, and the index among that source's units in the window."""
        counts = np.subtract(self._counts_before(window + 1), self._counts_before(window))
        sources = np.random.default_rng((self._seed, window, 2)).permutation(np.repeat(np.arange(len(counts)), counts))
        indices = np.zeros_like(sources)
        for source, count in enumerate(counts):
            indices[sources == source] = np.arange(count)
        return sources, indices


def _segments(weights: Sequence[Fraction], limits: Sequence[int]) -> list[_Segment]:
    """The segments of a mixture; after the last one all sources have left, or none leaves.

    Args:
        limits: most units of each source; empty: there are none.
    """
    window, counts, stays = 0, [0] * len(weights), [True] * len(weights)
    segments = []
    while any(stays):
        total = sum(weight for weight, is_in in zip(weights, stays, strict=True) if is_in)
        fractions = [weight / total if is_in else Fraction(0) for weight, is_in in zip(weights, stays, strict=True)]
        segments.append(_Segment(window, tuple(counts), tuple(fractions)))
        if not limits:
            return segments
        # Complete windows before each source would exceed its limit.
        lengths = {
            source: math.floor((limits[source] - counts[source]) / (MIX_WINDOW * fraction))
            for source, fraction in enumerate(fractions)
            if fraction
        }
        shortest = min(lengths.values())
        window += shortest
        counts = segments[-1].counts_before(window)
        stays = [is_in and lengths[source] > shortest for source, is_in in enumerate(stays)]
    return [*segments, _Segment(window, tuple(counts), (Fraction(0),) * len(weights))]


def training_order(
    units_per_shard: Sequence[Sequence[int] | np.ndarray],
    weights: Sequence[float],
    seed: int,
    window_shards: int,
    max_epochs: int = 0,
) -> SampleOrder | MixedOrder:
    """The stream of a run: of one source, or of several by weight, each shuffled for itself.

    Args:
        units_per_shard: of each source.
        seed: of the run.
        max_epochs: of a source in a mixture. 0: no limit.
    """
    seeds = [seed, *(_derive(seed, source) for source in range(1, len(units_per_shard)))]
    orders = [SampleOrder(units, derived, window_shards) for units, derived in zip(units_per_shard, seeds, strict=True)]
    return orders[0] if len(orders) == 1 else MixedOrder(orders, weights, seed, max_epochs)


def _derive(seed: int, source: int) -> int:
    return int(np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)[0])


class SequentialOrder:
    """Every unit once, in the order of the shards: for evaluation."""

    def __init__(self, units_per_shard: Sequence[int] | np.ndarray):
        self._ends = np.cumsum(np.asarray(units_per_shard, dtype=np.int64))
        self.num_units = int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, position: int) -> Unit:
        """The unit at a position below `num_units`."""
        if not 0 <= position < self.num_units:
            raise IndexError(f"position {position}: there are {self.num_units} units")
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return Unit(0, shard, position - (0 if shard == 0 else int(self._ends[shard - 1])))


def micro_batch_positions(
    step: int, micro_step: int, rank: int, global_batch: int, micro_batch: int, world_size: int
) -> range:
    """Positions of one rank's micro-batch.

    The ranks' micro-batches of one micro-step are neighbours in the order, so N ranks with micro-batch m read what one
    rank with micro-batch N m reads.
    """
    start = step * global_batch + (micro_step * world_size + rank) * micro_batch
    return range(start, start + micro_batch)


def batch_of_step(step: int, skipped: Sequence[Sequence[int]]) -> int:
    """The global batch that an optimizer step reads, both counted from 0.

    Args:
        skipped: ranges [first, end) of global batches that no step reads, ascending and without overlap.
    """
    batch = step
    for first, end in skipped:
        if batch < first:
            break
        batch += end - first
    return batch


def batches_read(num_steps: int, skipped: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The ranges [first, end) of global batches that the first steps read; see `batch_of_step`."""
    ranges, start = [], 0
    for first, end in [*skipped, (num_steps + sum(end - first for first, end in skipped),) * 2]:
        size = min(num_steps, first - start)
        if size > 0:
            ranges.append((start, start + size))
            num_steps -= size
        start = end
    return ranges


def full_batch_positions(num_units: int, rank: int, world_size: int, batch: int) -> list[list[int]]:
    """As `evaluation_positions`, but the batches are the same at any number of ranks, which take them in turn.

    The results of a batch are then the same to the last bit on any rank.
    """
    num_steps = math.ceil(math.ceil(num_units / batch) / world_size)
    starts = ((step * world_size + rank) * batch for step in range(num_steps))
    return [[position if position < num_units else -1 for position in range(start, start + batch)] for start in starts]


def evaluation_positions(num_units: int, rank: int, world_size: int, batch: int) -> list[list[int]]:
    """This rank's batches of an evaluation: each unit once over all ranks, every rank with as many batches.

    The last batches are filled up with -1, which stands for no unit.
    """
    positions = list(range(rank, num_units, world_size))
    num_batches = math.ceil(math.ceil(num_units / world_size) / batch)
    positions += [-1] * (num_batches * batch - len(positions))
    return [positions[start : start + batch] for start in range(0, len(positions), batch)]
