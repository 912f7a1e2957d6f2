"""Batches from the sample order, read ahead by worker processes.

The loader's only state is an optimizer step, to which it seeks. In training a sample that cannot be used is replaced by
the next good one of its shard, or of the shards after it, named in the log and counted once. In evaluation, where every
unit is scored once, it is an error.

Source: torch.utils.data.DataLoader for the processes.
"""

# Shapes: B rows of a batch.

import atexit
import functools
import itertools
import logging
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unimo3.data.args import ReaderArgs
from unimo3.data.order import (
    MixedOrder,
    SampleOrder,
    SequentialOrder,
    Unit,
    batch_of_step,
    evaluation_positions,
    micro_batch_positions,
)
from unimo3.data.sample_texts import BadSampleError
from unimo3.data.samples import Inputs, Samples
from unimo3.errors import DataError, explained
from unimo3.launch import STOP_SIGNALS

log = logging.getLogger(__name__)

Batch = dict[str, Any]

NO_POSITION = -1
# Texts of a batch that are encoded, with their image files in memory, before their images are decoded.
_TEXTS_AHEAD = 16
# Samples of further shards that are tried instead of a bad one.
_MAX_FURTHER = 1024
# Key of an error for the reading process: one raised in a worker would arrive with the worker's traceback in it.
UNUSABLE = "unusable"


class TrainingLoader:
    """One rank's micro-batches, one list an optimizer step, without end.

    Args:
        sources: what to read; a unit of the order names its source.
        order: in which order, by position.
        global_batch: units an optimizer step over all ranks.
        micro_batch: units a micro-step of this rank.
        start_step: optimizer steps already done.
        skipped: global batches that no step reads, see `batch_of_step`.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        order: SampleOrder | MixedOrder,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        reader: ReaderArgs,
        start_step: int = 0,
        skipped: Sequence[Sequence[int]] = (),
    ):
        num_accumulation = self._num_accumulation = global_batch // (micro_batch * world_size)
        # Without `self`: the readers' iterator references this, and must not reference the loader that ends them.
        positions = (
            list(micro_batch_positions(number, micro_step, rank, global_batch, micro_batch, world_size))
            for number in (batch_of_step(step, skipped) for step in itertools.count(start_step))
            for micro_step in range(num_accumulation)
        )
        start = batch_of_step(start_step, skipped) * global_batch
        with suppress(IndexError):  # the sources end here
            for position in range(start, start + micro_batch):
                order[position]  # permutes the epoch's shards, before the readers are forked, which share the result
        self._batches = _read_ahead(BatchReader(sources, order, replaces=True), positions, reader)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield [next(self._batches) for _ in range(self._num_accumulation)]


def evaluation_batches(
    samples: Samples, rank: int, world_size: int, batch: int, reader: ReaderArgs
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """One rank's part of all units, once: batches, and which of their rows count, [B] bool.

    Every rank gets as many batches. A row that does not count repeats another, so no rank runs out early.

    Raises:
        DataError: a sample cannot be used.
    """
    plan = evaluation_positions(int(samples.units_per_shard.sum()), rank, world_size, batch)
    return planned_batches(samples, plan, reader)


def planned_batches(
    samples: Samples, plan: list[list[int]], reader: ReaderArgs
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The batches of a plan, by units' positions in the order of the shards, and which rows count, [B] bool.

    A row that does not count is -1 in the plan, and repeats the first unit of all.

    Raises:
        DataError: a sample cannot be used.
    """
    order = SequentialOrder(samples.units_per_shard)
    filled = [[max(position, 0) for position in positions] for positions in plan]
    batches = _read_ahead(BatchReader([samples], order, replaces=False), filled, reader)
    for loaded, positions in zip(batches, plan, strict=True):
        yield loaded, torch.tensor([position != NO_POSITION for position in positions])


def _read_ahead(inputs: "BatchReader", positions: Iterable[list[int]], reader: ReaderArgs) -> Iterator[Batch]:
    loader = DataLoader(
        inputs,
        batch_sampler=positions,
        num_workers=reader.num_workers,
        prefetch_factor=reader.prefetch if reader.num_workers else None,
        # Readers share the index's memory and need no pickled samples; Python 3.14 no longer forks by default.
        multiprocessing_context="fork" if reader.num_workers else None,
        collate_fn=_as_read,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        # A separate one: starting to read draws a number, and a resumed run starts to read more often than a straight
        # one. From the process's generator, which dropout draws from, that would make them differ.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    end = functools.partial(_end_readers, iterator)
    if reader.num_workers:
        atexit.register(end)
    try:
        for batch in iterator:
            if UNUSABLE in batch:
                raise batch[UNUSABLE]
            replaced = batch.pop("replaced")
            for row in replaced:
                for key, reason in row:
                    log.warning("sample %s %s; replaced by the next good one", key, reason)
            batch["num_replaced"] = sum(map(bool, replaced))
            yield {
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for name, value in batch.items()
            }
    finally:
        if reader.num_workers:
            # An evaluation's readers end here, not at the end of the process.
            atexit.unregister(end)
            end()


def _end_readers(iterator: Any) -> None:
    """Ask reader processes to stop, and kill those that do not.

    They ignore SIGTERM, with which multiprocessing would end them; one that waits for a server would delay the exit.
    """
    iterator._shutdown_workers()
    for reader in iterator._workers:
        if reader.is_alive():
            reader.kill()


class BatchReader(Dataset[Batch]):
    """Positions of an order -> a batch, or an error under `UNUSABLE`.

    Its ``images`` are a tensor in shared memory, written there as they are decoded. The rest is small and stays numpy
    arrays, which travel in the queue's message: each tensor would take a connection between the processes.

    Args:
        replaces: whether the next good sample of its shard stands in for a bad one.
    """

    def __init__(self, sources: Sequence[Samples], order: SampleOrder | MixedOrder | SequentialOrder, replaces: bool):
        self._sources = sources
        self._units_per_shard = [samples.units_per_shard for samples in sources]
        self._order = order
        self._replaces = replaces

    def __getitems__(self, positions: list[int]) -> Batch:
        rows: list[Inputs] = []
        replaced: list[list[tuple[str, str]]] = []
        images = torch.empty(0)
        try:
            # Some texts, then their images: between two images, which leave nothing of it in the processor's caches, a
            # text takes three times as long.
            for start in range(0, len(positions), _TEXTS_AHEAD):
                units = [self._order[position] for position in positions[start : start + _TEXTS_AHEAD]]
                for unit, text in [(unit, self._text(unit)) for unit in units]:
                    row, bad = self._row(unit, text)
                    image = row.pop("images")
                    if not rows:
                        images = _shared(len(positions), image)
                    images.numpy()[len(rows)] = image
                    rows.append(row)
                    replaced.append(bad)
        except DataError as error:
            return {UNUSABLE: explained(error)}
        return {"images": images, **_stacked(rows), "positions": np.asarray(positions), "replaced": replaced}

    def _text(self, unit: Unit) -> Inputs | None:
        """Inputs whose image is still to be decoded; none of a unit that cannot be used, which `_row` meets again."""
        try:
            return self._sources[unit.source].build(unit)
        except (BadSampleError, DataError):
            return None

    def _row(self, unit: Unit, text: Inputs | None) -> tuple[Inputs, list[tuple[str, str]]]:
        """A unit's inputs, and which samples they stand in for, with reasons.

        Raises:
            DataError: there are none.
        """
        samples = self._sources[unit.source]
        replaced: list[tuple[str, str]] = []
        for step, candidate in enumerate(_candidates(unit, self._units_per_shard[unit.source])):
            shard = f"{samples.index.source}/{samples.index.shards[candidate.shard].name}"
            key = samples.key(candidate)
            try:
                inputs = text if text is not None and not step else samples.build(candidate)
                position = (samples.index.source, samples.index.shards[candidate.shard].name, candidate.unit)
                named = {"keys": key, "samples": (*position, key), "source": np.asarray(candidate.source)}
                return {**inputs, "images": inputs["images"](), **named}, replaced
            except BadSampleError as error:
                if not self._replaces:
                    raise DataError(
                        f"{shard}: sample {key} {error}; held-out samples must all be scored: fix the source and "
                        "prepare the shards again"
                    ) from error
                replaced.append((f"{shard}/{key}", str(error)))
        raise DataError(
            f"{replaced[0][0]} {replaced[0][1]}, and so with the next {len(replaced) - 1}: no good one to replace it; "
            "prepare the shards again"
        )


def _candidates(unit: Unit, units_per_shard: np.ndarray) -> Iterator[Unit]:
    """A unit and what may stand in for it: the others of its shard, then some of the shards after it."""
    num_units = int(units_per_shard[unit.shard])
    for step in range(num_units):
        yield unit._replace(unit=(unit.unit + step) % num_units)
    further = (
        unit._replace(shard=shard, unit=number)
        for step in range(1, len(units_per_shard))
        for shard in [(unit.shard + step) % len(units_per_shard)]
        for number in range(int(units_per_shard[shard]))
    )
    yield from itertools.islice(further, _MAX_FURTHER)


def _shared(num_rows: int, row: np.ndarray) -> Tensor:
    """Room for `num_rows` like this one; in a reader process, where the training process sees it too."""
    shape = (num_rows, *row.shape)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's collation does it: a tensor that is not in shared memory is copied there when it is handed over.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(math.prod(shape))).view(shape)


def _stacked(rows: list[Inputs]) -> Batch:
    """Arrays are stacked, other values listed."""
    batch: Batch = {}
    for name, value in rows[0].items():
        values = [row[name] for row in rows]
        batch[name] = np.stack(values) if isinstance(value, np.ndarray) else values
    return batch


def _as_read(batch: Any) -> Any:
    """Replaces torch's collation, which `BatchReader` does itself."""
    return batch


def _ignore_stop_signals(worker: int) -> None:
    # Slurm signals every process of a job step; a reader that died of it would take the save down with it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
