"""Metrics on held-out data, with every unit counted once over all ranks."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch

from unimo3.data.loader import ReaderArgs, evaluation_batches
from unimo3.data.samples import Samples
from unimo3.data.transforms import normalize
from unimo3.distributed import World, sum_over_ranks
from unimo3.engine import Engine
from unimo3.training.early_stopping import Best
from unimo3.training.metrics import Metrics
from unimo3.training.preempt import StopListener, StopRequest, StopRequested
from unimo3.training.watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = TypeVar("Batch")


class Evaluation(NamedTuple):
    """Held-out data, known by its index's fingerprint, and its metrics at a step; every rank computes them.

    Their batches go through a `Guard`, the same number on every rank; if the run must end there are no metrics.

    Attributes:
        split: the data's, for the record.
        best: chooses the best checkpoint by the metrics. None: nothing is chosen on this data.
        pictures: of some samples by name, for TensorBoard; every rank calls it, after the metrics are recorded.
    """

    fingerprint: str
    metrics: Callable[[int, "Guard"], Metrics | None]
    split: str = ""
    best: Best | None = None
    pictures: "Callable[[Guard], dict[str, Image]] | None" = None


class Guard(Protocol):
    """Yields batches until the run must end.

    Attributes:
        is_stopped: whether the run must end.
    """

    is_stopped: bool

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; every rank takes the same number."""
        ...


class Unguarded:
    """Yields all batches, where no stop can be requested."""

    is_stopped = False

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        return batches


class StopGuard:
    """Yields evaluation batches until a rank is asked to stop; the wait for one is interrupted as in training."""

    def __init__(self, listener: StopListener, watch: Watch, step: int, device: torch.device):
        self.is_stopped = False
        self._listener, self._watch, self._step, self._device = listener, watch, step, device

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; every rank takes the same number."""
        while True:
            batch = None
            self._watch.beat("evaluate", self._step)
            with suppress(StopRequested), self._listener.interruptible():
                batch = next(batches, None)
            self.is_stopped = self._listener.agree(self._device) != StopRequest.NONE
            if self.is_stopped or batch is None:
                return
            yield batch


@torch.no_grad()
def held_out_losses(
    engine: Engine, samples: Samples, world: World, batch: int, reader: ReaderArgs, guard: Guard
) -> Metrics | None:
    """Mean of the task's metrics over full batches of `samples`; every rank calls it. None if the run must end.

    The contrastive loss depends on the batch it is computed in, so only batches that are full on all ranks count; if
    not even the first is, it counts as it is, filled up with repeated rows.
    """
    engine.eval()
    totals: dict[str, torch.Tensor] = {}
    num_batches = 0
    for loaded, counts in guard.batches(evaluation_batches(samples, world.rank, world.size, batch, reader)):
        if not bool(sum_over_ranks(counts.all().long().reshape(1))[0] == world.size) and num_batches:
            break
        report = engine(to_device(loaded, engine.device))
        for name, value in report.items():
            totals[name] = totals.get(name, 0.0) + value.float()
        num_batches += 1
    if guard.is_stopped:
        return None
    return {
        name: (sum_over_ranks(total) / (num_batches * world.size)).tolist() for name, total in sorted(totals.items())
    }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors, and make of its ``images`` the ``pixel_values`` of the model."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    moved["pixel_values"] = normalize(moved.pop("images"))
    return moved
