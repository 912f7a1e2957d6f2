"""Settings of when to save and what to keep."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointArgs:
    """Checkpoints of the run; one is also written at the end and when the run is interrupted."""

    every_steps: int = 1000
    """Optimizer steps between checkpoints."""
    keep_last: int = 3
    """Newest checkpoints to keep, at least 1."""
    keep_every: int = 0
    """Steps; checkpoints at multiples of it are never removed. 0: none."""

    background: bool = False
    """Whether files are written in the background, from a copy in host memory: only the copy blocks a step, and each
    rank needs additional memory of the size of its files."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """Whether a save that failed ends the run with status 78, or is logged and tried again at the next one. The last
    save of a run must succeed in any case."""

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line per error."""
        errors = []
        if self.every_steps < 1:
            errors.append(f"checkpoint.every_steps: {self.every_steps}: at least 1 step is needed")
        if self.keep_last < 1:
            errors.append(f"checkpoint.keep_last: {self.keep_last}: at least 1 is needed to resume")
        if self.keep_every < 0:
            errors.append(f"checkpoint.keep_every: {self.keep_every}: 0 (none) or a number of steps is needed")
        return errors
