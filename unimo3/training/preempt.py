"""Notice of a request to stop, by a signal or a file, acted on by all ranks together between steps.

    RUN/requeue    save and end with status 75. Rank 0 removes the file; one that is older than the process is ignored.
                   A rank that got a signal makes it, for ranks that got none and wait for data
    RUN/stop       save and end with status 0; it stays, so that no later start continues

Once a run trains, a signal handler only records the request. Only a wait for data is interrupted: otherwise a rank
without data would make all others wait forever. Before a run trains nothing can be lost, and a signal ends the process.

Source: Slurm's sbatch --signal and preemption (SIGTERM before the end of the grace time).
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from unimo3.distributed import sum_over_ranks, world
from unimo3.errors import EXIT_REQUEUE, end_process
from unimo3.launch import STOP_SIGNALS

REQUEUE_FILE, STOP_FILE = "requeue", "stop"


class StopRequest(IntEnum):
    """What a rank was asked for; the largest of all ranks' requests counts."""

    NONE = 0
    REQUEUE = 1
    STOP = 2

    @classmethod
    def of_counts(cls, requeue: float, stop: float) -> "StopRequest":
        """What all ranks do, by the numbers of ranks that ask for each."""
        return cls.STOP if stop else cls.REQUEUE if requeue else cls.NONE


class StopRequested(BaseException):
    """Raised while waiting for data when a request comes; no `Exception`, so that nothing takes it for bad data."""


class StopListener:
    """Remembers the first request to stop: a file newer than this object, or a signal since `install`.

    Attributes:
        name: of what asked: a signal, or a file in the run's folder.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._request = StopRequest.NONE
        self._folder: Path | None = None
        self._started = time.time()
        self._is_passed_on = False
        self._is_interruptible = False

    def install(self) -> "StopListener":
        """Take over the stop signals: until `watch` they end the process, to be started again."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def watch(self, folder: Path) -> None:
        """From here on only note signals, and have `look` look for files in a run's folder."""
        self._started += _server_is_ahead_s(folder)
        self._folder = folder
        self.look()

    @property
    def received(self) -> bool:
        """Whether this process was asked."""
        return self._request != StopRequest.NONE

    def look(self) -> None:
        """Look for the files, and pass a signal on; any thread may call it now and then."""
        if self._folder is None or self._request == StopRequest.STOP:
            return
        if self._request == StopRequest.REQUEUE and not self._is_passed_on:
            with suppress(OSError):  # tried again at the next look; most often all ranks got the signal
                (self._folder / REQUEUE_FILE).touch()
                self._is_passed_on = True
        for name, request in ((STOP_FILE, StopRequest.STOP), (REQUEUE_FILE, StopRequest.REQUEUE)):
            if request > self._request and self._is_there(self._folder / name):
                self._is_passed_on = True
                self._request, self.name = request, f"the file {self._folder / name}"
                if signal.getsignal(signal.SIGUSR1) == self._note:
                    os.kill(os.getpid(), signal.SIGUSR1)  # the main thread may be waiting for data
                return

    def _is_there(self, path: Path) -> bool:
        try:
            made = path.stat().st_mtime
        except OSError:
            return False
        return path.name == STOP_FILE or made >= self._started

    def counts(self) -> tuple[bool, bool]:
        """What this rank adds to the numbers of ranks that ask for a requeue and for a stop."""
        return self._request == StopRequest.REQUEUE, self._request == StopRequest.STOP

    def agree(self, device: torch.device) -> StopRequest:
        """What all ranks do now; every rank calls it."""
        counts = torch.tensor(self.counts(), dtype=torch.int32, device=device)
        return StopRequest.of_counts(*sum_over_ranks(counts).tolist())

    def done(self) -> None:
        """Remove the file that asked for a requeue: it has been heard."""
        if self._folder is not None and world()[0] == 0:
            (self._folder / REQUEUE_FILE).unlink(missing_ok=True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While in it, a request raises `StopRequested`."""
        self._is_interruptible = True
        try:
            if self.received:
                raise StopRequested
            yield
        finally:
            self._is_interruptible = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._folder is None:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"Interrupted: asked to stop ({signal.Signals(number).name}) before training began, nothing is "
                    "lost; start the same command to continue",
                    file=sys.stderr,
                    flush=True,
                )
            end_process(EXIT_REQUEUE, is_recorded=False)  # the signal may come because another rank has failed
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        if self._request == StopRequest.NONE:
            self._request, self.name = StopRequest.REQUEUE, signal.Signals(number).name
        if self._is_interruptible:
            self._is_interruptible = False  # a second one must not raise where nobody catches it
            raise StopRequested


def _server_is_ahead_s(folder: Path) -> float:
    """Seconds by which the clock of the folder's file server, which dates its files, is ahead of this host's."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as file:
        before = time.time()
        file.write(b"1")
        file.flush()
        os.fsync(file.fileno())  # else a client of NFS answers by its own clock
        return os.fstat(file.fileno()).st_mtime - before
    return 0.0
