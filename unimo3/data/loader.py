"""Batches from the sample order, read ahead by worker processes.

The loader's whole state is one optimizer step: it seeks there. In training a sample that cannot be used is replaced by
the next good one of its shard, named in the log and counted. In evaluation, where every unit is scored once, it is an
error.

Source: torch.utils.data.DataLoader for the processes.
"""

# Shapes: B rows of a batch.

import atexit
import functools
import itertools
import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from unimo3.data.order import (
    MixedOrder,
    SampleOrder,
    SequentialOrder,
    evaluation_positions,
    micro_batch_positions,
)
from unimo3.data.samples import BadSampleError, Inputs, Samples
from unimo3.errors import DataError
from unimo3.launch import STOP_SIGNALS

log = logging.getLogger(__name__)

Batch = dict[str, Any]

NO_POSITION = -1
# Key of a message for the reading process: an error raised in a worker would arrive with the worker's traceback in it.
UNUSABLE = "unusable"


@dataclass(frozen=True)
class ReaderArgs:
    """How many processes read, and how far ahead."""

    num_workers: int
    prefetch: int


class TrainingLoader:
    """One rank's micro-batches, one list an optimizer step, without end.

    Args:
        sources: what to read; a unit of the order says of which.
        order: in which order, by position.
        global_batch: units an optimizer step over all ranks.
        micro_batch: units a micro-step of this rank.
        start_step: optimizer steps already done.
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
    ):
        self._num_accumulation = global_batch // (micro_batch * world_size)
        positions = (
            list(micro_batch_positions(step, micro_step, rank, global_batch, micro_batch, world_size))
            for step in itertools.count(start_step)
            for micro_step in range(self._num_accumulation)
        )
        self._batches = _read_ahead(_Positions(sources, order, replaces=True), positions, reader)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield [next(self._batches) for _ in range(self._num_accumulation)]


def evaluation_batches(
    samples: Samples, rank: int, world_size: int, batch: int, reader: ReaderArgs
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """One rank's share of all units, once: batches, and which of their rows count, [B] bool.

    Every rank gets as many batches. A row that does not count repeats another, so no rank runs out early.

    Raises:
        DataError: a sample cannot be used.
    """
    order = SequentialOrder(samples.units_per_shard)
    plan = evaluation_positions(order.num_units, rank, world_size, batch)
    filled = [[max(position, 0) for position in positions] for positions in plan]
    batches = _read_ahead(_Positions([samples], order, replaces=False), filled, reader)
    for loaded, positions in zip(batches, plan, strict=True):
        yield loaded, torch.tensor([position != NO_POSITION for position in positions])


def _read_ahead(inputs: "_Positions", positions: Iterable[list[int]], reader: ReaderArgs) -> Iterator[Batch]:
    loader = DataLoader(
        inputs,
        batch_sampler=positions,
        num_workers=reader.num_workers,
        prefetch_factor=reader.prefetch if reader.num_workers else None,
        collate_fn=_collate,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        # One of its own: starting to read draws a number, and a resumed run starts to read more often than a straight
        # one. From the process's generator, which dropout draws from, that would make them differ.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    end = functools.partial(_end_readers, iterator)
    if reader.num_workers:
        atexit.register(end)
    try:
        for batch in _explain_deaths(iterator, reader):
            if UNUSABLE in batch:
                raise DataError(batch[UNUSABLE])
            for key, reason in batch.pop("replaced"):
                log.warning("sample %s %s; replaced by the next one of its shard", key, reason)
            yield batch
    finally:
        if reader.num_workers:
            # Nothing of an evaluation is kept until the process ends.
            atexit.unregister(end)
            end()


def _end_readers(iterator: Any) -> None:
    """Tell reader processes to stop, and kill those that do not.

    They ignore SIGTERM, with which multiprocessing would end them; one that waits for a server would hold up the exit.
    """
    iterator._shutdown_workers()
    for reader in iterator._workers:
        if reader.is_alive():
            reader.kill()


def _explain_deaths(batches: Iterator[Batch], reader: ReaderArgs) -> Iterator[Batch]:
    """Say what to do where a reader process was killed, which torch reports by its number and signal alone."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a reader process ended before its time: {error}; the system's log says why, most often memory ran "
                f"out: lower data.num_workers ({reader.num_workers}) or data.prefetch ({reader.prefetch}), and start "
                "the same command again"
            ) from error
        yield batch


class _Positions(Dataset[Inputs]):
    """Positions of an order -> inputs, or a message under `UNUSABLE`.

    Args:
        replaces: whether the next good sample of its shard stands in for a bad one.
    """

    def __init__(self, sources: Sequence[Samples], order: SampleOrder | MixedOrder | SequentialOrder, replaces: bool):
        self._sources = sources
        self._units_per_shard = [samples.units_per_shard for samples in sources]
        self._order = order
        self._replaces = replaces

    def __getitem__(self, position: int) -> Inputs:
        try:
            return self._read(position)
        except DataError as error:
            return {UNUSABLE: str(error)}

    def _read(self, position: int) -> Inputs:
        unit = self._order[position]
        samples, units_in_shard = self._sources[unit.source], self._units_per_shard[unit.source][unit.shard]
        shard = f"{samples.index.source}/{samples.index.shards[unit.shard].name}"
        replaced = []
        for step in range(units_in_shard):
            candidate = unit._replace(unit=(unit.unit + step) % units_in_shard)
            try:
                inputs = samples.build(candidate)
            except BadSampleError as error:
                key = samples.key(candidate)
                if not self._replaces:
                    return {UNUSABLE: f"{shard}: sample {key} {error}; held-out samples must all be scored: mend the "
                            "source and prepare the shards again"}  # fmt: skip
                replaced.append((f"{shard}/{key}", str(error)))
                continue
            key = samples.key(candidate)
            return {**inputs, "positions": torch.tensor(position), "keys": key, "replaced": replaced}
        return {UNUSABLE: f"{shard}: has no usable sample ({replaced[0][1]}); prepare the shards again"}


def _collate(rows: list[Inputs]) -> Batch:
    """Tensors are stacked, other values listed."""
    unusable = [row for row in rows if UNUSABLE in row]
    if unusable:
        return unusable[0]
    batch: Batch = {}
    for name, value in rows[0].items():
        values = [row[name] for row in rows]
        batch[name] = torch.stack(values) if isinstance(value, torch.Tensor) else values
    batch["replaced"] = [entry for row in batch["replaced"] for entry in row]
    batch["num_replaced"] = len(batch["replaced"])
    return batch


def _ignore_stop_signals(worker: int) -> None:
    # Slurm signals every process of a job step; a reader that died of it would take the save down with it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
