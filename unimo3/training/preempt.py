"""Notice of a request to stop: noted by a signal handler, acted on at the next step boundary.

Source: Slurm's sbatch --signal and preemption (SIGTERM before the end of the grace time).
"""

import signal
from types import FrameType

from unimo3.launch import STOP_SIGNALS


class StopRequest:
    """Remembers the first stop signal this process got since `install`."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> "StopRequest":
        """Take over the stop signals; a second SIGINT ends the process as usual."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    @property
    def received(self) -> bool:
        """Whether a signal came."""
        return self.name is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
