"""The run's metrics: one JSON object a step in ``metrics.jsonl``, and the same as TensorBoard events.

A resumed run continues both files: what was written for steps after the checkpoint is dropped first, so each step
stands there once.
"""

import json
import logging
import math
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimo3.atomic_write import replace_text
from unimo3.gate_map import draw_gate_map, num_tower_levels
from unimo3.json_lines import read_records
from unimo3.objectives.by_source import means_by_source
from unimo3.training.throughput import Throughput

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

Metrics = dict[str, Any]

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes on rank 0; on other ranks every call does nothing.

    Args:
        folder: the run's folder.
        resumed_step: steps done before; later records are dropped. None: nothing is dropped.
        enabled: whether this is rank 0.
        gate_heads: whether gate maps have a map for each head.
        map_every: steps between two gate maps of the training at least.
    """

    def __init__(
        self, folder: Path, resumed_step: int | None, enabled: bool, gate_heads: bool = False, map_every: int = 1
    ):
        self._file = None
        self._board: SummaryWriter | None = None
        self._is_cut_off = False
        self._gate_heads, self._map_every = gate_heads, map_every
        self._next_map: dict[str, int] = {}
        self._num_tower_levels = num_tower_levels(folder)
        if enabled:
            path = folder / "metrics.jsonl"
            if resumed_step is not None:
                drop_after(path, resumed_step)
            written = path.read_bytes() if path.exists() else b""
            self._is_cut_off = bool(written) and not written.endswith(b"\n")
            self._file = path.open("a", buffering=1)
            # Here, since one rank alone writes events; the import loads a hundred modules.
            from torch.utils import tensorboard

            purge_step = None if resumed_step is None else resumed_step + 1
            self._board = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, metrics: Metrics, group: str = "train") -> None:
        """Append one record, and the same as events.

        Args:
            metrics: ``step``, plain numbers, texts (not for TensorBoard), and gates, see `unimo3.gate_map.Gates`,
                of which TensorBoard gets a gate map.
            group: heads the names in TensorBoard.
        """
        if self._file is None:
            return
        record = json.dumps(metrics if group == "train" else {"group": group, **metrics}) + "\n"
        try:
            # After a truncated line, on a new one.
            self._file.write("\n" + record if self._is_cut_off else record)
            self._is_cut_off = False
        except OSError as error:
            self._is_cut_off = True
            log.warning("metrics of step %s cannot be written yet (%s)", metrics["step"], error)
        self._add_events(metrics, group)

    def write_pictures(self, step: int, pictures: "dict[str, Image]", group: str = "eval") -> None:
        """Show pictures in TensorBoard, by name."""
        self._add_events({"step": step} | {name: np.asarray(picture) for name, picture in pictures.items()}, group)

    def _add_events(self, values: Metrics, group: str) -> None:
        board, step = self._board, values["step"]
        if board is None:
            return
        try:
            _add_scalars(board, values, group)
            for name, value in values.items():
                if isinstance(value, list) and step >= self._next_map.get(f"{group}/{name}", 0):
                    self._next_map[f"{group}/{name}"] = step + (self._map_every if group == "train" else 1)
                    gate_map = draw_gate_map(value, self._num_tower_levels, f"{name} at step {step}", self._gate_heads)
                    board.add_image(f"{group}/{name}", np.asarray(gate_map), step, dataformats="HWC")
                elif isinstance(value, np.ndarray):
                    board.add_image(f"{group}/{name}", value, step, dataformats="HWC")
        except OSError as error:  # its thread has ended with the error, and will not begin again
            self._board = None
            log.warning("no more events for TensorBoard from step %s on (%s)", step, error)

    def close(self) -> None:
        """Flush and close both."""
        for file in (self._file, self._board):
            with suppress(OSError):  # reported before
                if file is not None:
                    file.close()


def _add_scalars(board: Any, values: Metrics, group: str) -> None:
    """Write all numbers as one event: TensorBoard opens, writes and closes its file for each event."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
    if numbers:
        scalars = [Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in numbers.items()]
        board.file_writer.add_summary(Summary(value=scalars), values["step"])


def read_metrics(folder: Path, group: str | None = None) -> list[Metrics]:
    """Records of ``metrics.jsonl``: the training steps' (`group` None) or another group's."""
    return [record for record in read_records(folder / "metrics.jsonl") if record.get("group") == group]


def drop_after(path: Path, step: int) -> None:
    """Remove records of steps after `step`, and a last line that a kill left half-written."""
    if not path.exists():
        return
    records = [record for record in read_records(path) if _step_of(record) <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _step_of(record: dict[str, Any]) -> float:
    """Its step; that of a record without one is after every other."""
    step = record.get("step")
    return step if isinstance(step, int | float) else math.inf


@dataclass(frozen=True)
class StepResult:
    """A finished step of this rank.

    Attributes:
        means: of its micro-batches' losses and other scalars.
        gates: its mean gate weights, not reduced over ranks.
        num_bad: samples that were replaced.
        lr: of the towers.
        raw_norm: of the gradient, see `gradient_norm`.
        was_skipped: whether the optimizer left the weights as they were.
        step_s: seconds since the step before, the wait for data included.
        data_s: seconds of `step_s` that this rank waited for data.
    """

    means: "dict[str, Tensor]"
    gates: "dict[str, Tensor]"
    num_bad: int
    lr: float
    raw_norm: "Tensor | float"
    was_skipped: bool
    step_s: float
    data_s: float

    @property
    def grad_norm(self) -> float:
        """The gradient's norm, nan if it is not finite; waits for the device."""
        norm = float(self.raw_norm)
        return norm if norm >= 0 else math.nan


def step_metrics(
    step: int, global_batch: int, result: StepResult, means: Metrics, throughput: Throughput | None, counts: Metrics
) -> Metrics:
    """What is logged of an optimizer step: a metric is added here.

    Args:
        means: losses and other scalars of the task, means over all ranks; one that is not finite is logged as None.
        throughput: None: operations are not counted.
        counts: of the complete run.
    """
    samples_per_s = global_batch / result.step_s
    return {
        "step": step,
        "samples": step * global_batch,
        **{name: finite(value) for name, value in means_by_source(means).items()},
        "lr": result.lr,
        "grad_norm": finite(result.grad_norm),
        "pairs_per_s": samples_per_s,
        "step_s": result.step_s,
        "data_s": result.data_s,
        **(throughput.metrics(samples_per_s) if throughput else {}),
        **counts,
        "memory_bytes": peak_memory_bytes(),
    }


def finite(value: float | None) -> float | None:
    """A number as it is logged: JSON has none that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def peak_memory_bytes() -> int:
    """Peak memory of this process: the GPU's since `forget_peak_memory` where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Begin a new window of the GPU's peak memory; without a GPU do nothing."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
