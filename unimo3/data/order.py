"""The sample order: a pure function of (seed, position), whatever the number of ranks, workers or micro-steps.

Epoch e permutes the shards, groups them in windows, and permutes the units inside each window; epochs follow each
other without a gap. Position p is a number of units since the beginning, so resuming is a seek. Global batch t is
positions [t G, (t + 1) G); nothing is dropped at an epoch's end.

Source: shard and shuffle-buffer shuffling as in WebDataset, made a function of the position.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Unit(NamedTuple):
    """One unit of the stream: its epoch, its shard, and its number in that shard."""

    epoch: int
    shard: int
    unit: int


class SampleOrder:
    """Random access to the shuffled stream; memory is one window of units and one permutation of shards.

    Args:
        units_per_shard: how many units each shard has; shards may be uneven or empty.
        seed: of the run.
        window_shards: shards whose units are shuffled together.
    """

    def __init__(self, units_per_shard: Sequence[int], seed: int, window_shards: int):
        self._sizes = np.asarray(units_per_shard, dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self.num_units = int(self._sizes.sum())
        if self.num_units == 0:
            raise ValueError("units_per_shard: holds no units; an order needs at least one")
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
        window = int(np.searchsorted(ends[self._window_shards - 1 :: self._window_shards], offset, side="right"))
        start = 0 if window == 0 else int(ends[window * self._window_shards - 1])
        local = int(self._units_of_window(epoch, window)[offset - start])
        members = shards[window * self._window_shards : (window + 1) * self._window_shards]
        member_ends = np.cumsum(self._sizes[members])
        member = int(np.searchsorted(member_ends, local, side="right"))
        return Unit(epoch, int(members[member]), local - (0 if member == 0 else int(member_ends[member - 1])))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = np.random.default_rng((self._seed, epoch, 0)).permutation(len(self._sizes))
        return shards, np.cumsum(self._sizes[shards])

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        shards, _ = self._shards_of_epoch(epoch)
        members = shards[window * self._window_shards : (window + 1) * self._window_shards]
        rng = np.random.default_rng((self._seed, epoch, 1, window))
        return rng.permutation(int(self._sizes[members].sum()))


class SequentialOrder:
    """Every unit once, in the order of the shards: for evaluation."""

    def __init__(self, units_per_shard: Sequence[int]):
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


def evaluation_positions(num_units: int, rank: int, world_size: int, batch: int) -> list[list[int]]:
    """This rank's batches of an evaluation: each unit once over all ranks, every rank with as many batches.

    The last batches are filled up with -1, which stands for no unit.
    """
    own = list(range(rank, num_units, world_size))
    num_batches = math.ceil(math.ceil(num_units / world_size) / batch)
    own += [-1] * (num_batches * batch - len(own))
    return [own[start : start + batch] for start in range(0, len(own), batch)]
