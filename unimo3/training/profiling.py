"""Traces of a rank's next steps, on request: the file RUN/profile, see preempt.py.

    RUN/profile/step_00000012/rank_00000.json.gz       a Chrome trace, from step 12 on
    RUN/profile/step_00000012/rank_00000.pickle        of a GPU, its memory, for https://pytorch.org/memory_viz

Source: torch.profiler; torch.cuda.memory's snapshots.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from unimo3.training.preempt import PROFILE_FILE

log = logging.getLogger(__name__)

NUM_STEPS = 3
# Allocations and frees that a memory snapshot has at most.
_MAX_ALLOCATIONS = 1_000_000


class StepProfiler:
    """One rank's; the ranks trace the same steps, since `request` follows what they have agreed on.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path, rank: int):
        self._run, self._rank = run, rank
        self._num_left = 0
        self._trace: profile | None = None
        self._path = run

    @property
    def is_active(self) -> bool:
        """Whether the next step is to be traced."""
        return self._num_left > 0

    def request(self) -> None:
        """Have the next steps traced."""
        self._num_left = NUM_STEPS

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Contains an optimizer step, which is traced if that was requested.

        Args:
            number: of the step, which names its part of the trace.
        """
        if not self._num_left:
            yield
            return
        if self._trace is None:
            self._begin(number)
        with record_function(f"optimizer step {number}"):
            yield
        self._num_left -= 1
        if not self._num_left:
            self.close()

    def close(self) -> None:
        """Write what has been traced, fewer steps than requested where the run ends before."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(f"{self._path}.json.gz")
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(f"{self._path}.pickle")
        except (OSError, RuntimeError) as error:  # Kineto's own of a file that it cannot write
            log.warning("the trace %s.json.gz cannot be written (%s)", self._path, error)
        else:
            if self._rank == 0:
                log.info("traces of the last steps are in %s", self._path.parent)
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)

    def _begin(self, number: int) -> None:
        self._path = self._run / PROFILE_FILE / f"step_{number:08d}" / f"rank_{self._rank:05d}"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
        self._trace = profile(activities=activities, record_shapes=True)
        self._trace.start()
