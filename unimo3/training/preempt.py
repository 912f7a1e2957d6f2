"""Notice of a request to stop, or to trace steps, by a signal or a file, acted on by all ranks together between steps.

    RUN/requeue    save and exit with status 75. Rank 0 removes the file; one that is older than the process is ignored.
                   A rank that got a signal makes it, for ranks that got none and wait for data
    RUN/stop       save and exit with status 0; it stays, so that no later start continues
    RUN/profile    trace the next steps into the folder of this name, which replaces the file, see profiling.py; later,
                   a touch of the folder requests it again

Rank 0 looks for the files, and the all-reduce of each step passes a request on: hundreds of ranks that look would load
the folder's server. Another rank looks only while it waits long for data, where rank 0 cannot reach it.

Once a run trains, a signal handler only records the request. Only a wait for data is interrupted: otherwise a rank
without data would make all others wait forever. Before a run trains nothing can be lost, and a signal ends the process.

Source: Slurm's sbatch --signal and preemption (SIGTERM before the end of the grace time).
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from unimo3.distributed import sum_over_ranks, world
from unimo3.errors import EXIT_REQUEUE, end_process, report
from unimo3.launch import STOP_SIGNALS
from unimo3.training.heartbeat import server_is_ahead_s

REQUEUE_FILE, STOP_FILE, PROFILE_FILE = "requeue", "stop", "profile"


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
        wants_profile: whether steps are to be traced; on rank 0 alone, which then calls `prepare_profile`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.wants_profile = False
        self._lock = threading.Lock()  # protects `wants_profile` and `_profiled`
        self._profiled = 0.0  # time of the folder of traces when it was last looked at or written
        self._request = StopRequest.NONE
        self._folder: Path | None = None
        self._made = time.monotonic()
        self._started = 0.0  # by the clock of the folder's server
        self._is_forwarded = False
        self._is_interruptible = False
        self._num_waits = self._polled_wait = 0  # for data, so far and at the last poll
        self._is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"  # later it is the index of a GPU

    def install(self) -> "StopListener":
        """Take over the stop signals: until `watch_folder` they end the process, to be started again."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def watch_folder(self, folder: Path) -> None:
        """From here on only note signals, and have `poll_files` look for files in a run's folder."""
        # The clock may have been corrected since this object was made.
        self._started = time.time() - (time.monotonic() - self._made) + server_is_ahead_s(folder)
        self._folder = folder
        with suppress(OSError):
            self._profiled = (folder / PROFILE_FILE).stat().st_mtime
        self.poll_files()

    @property
    def received(self) -> bool:
        """Whether this process was asked."""
        return self._request != StopRequest.NONE

    def poll_files(self) -> None:
        """Look for the files if that is this rank's task, and pass a signal on; any thread may call it now and then."""
        if self._folder is None or self._request == StopRequest.STOP:
            return
        is_first = world()[0] == 0
        if is_first:
            with self._lock, suppress(OSError):
                state = (self._folder / PROFILE_FILE).stat()
                self.wants_profile |= not stat.S_ISDIR(state.st_mode) or state.st_mtime > self._profiled
        if self._request == StopRequest.REQUEUE and not self._is_forwarded:
            with suppress(OSError):  # tried again at the next call; most often all ranks got the signal
                (self._folder / REQUEUE_FILE).touch()
                self._is_forwarded = True
        if not (self._waits_since_last_poll() or is_first):
            return
        for name, request in ((STOP_FILE, StopRequest.STOP), (REQUEUE_FILE, StopRequest.REQUEUE)):
            if request > self._request and self._is_there(self._folder / name):
                self._is_forwarded = True
                self._request, self.name = request, f"the file {self._folder / name}"
                if signal.getsignal(signal.SIGUSR1) == self._on_signal:
                    os.kill(os.getpid(), signal.SIGUSR1)  # the main thread may be waiting for data
                return

    def _waits_since_last_poll(self) -> bool:
        wait = self._num_waits if self._is_interruptible else 0
        is_same, self._polled_wait = wait == self._polled_wait, wait
        return is_same and wait > 0

    def _is_there(self, path: Path) -> bool:
        try:
            made = path.stat().st_mtime
        except OSError:
            return False
        return path.name == STOP_FILE or made >= self._started

    def prepare_profile(self, step: int) -> None:
        """Make the folder for traces from a step on, in place of the file that requested them."""
        assert self._folder is not None, "`watch_folder` comes first"
        path = self._folder / PROFILE_FILE
        with self._lock, suppress(OSError):  # the profiler reports what it cannot write
            if not path.is_dir():
                path.unlink()
            # Ranks write into this folder alone: it is this rank and the user who change the time of the one around it.
            (path / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
            self._profiled = path.stat().st_mtime
            self.wants_profile = False

    def counts(self) -> tuple[bool, bool]:
        """What this rank adds to the numbers of ranks that ask for a requeue and for a stop."""
        return self._request == StopRequest.REQUEUE, self._request == StopRequest.STOP

    def agree(self, device: torch.device) -> StopRequest:
        """What all ranks do now; every rank calls it."""
        counts = torch.tensor(self.counts(), dtype=torch.int32, device=device)
        return StopRequest.of_counts(*sum_over_ranks(counts).tolist())

    def done(self) -> None:
        """Remove the file that asked for a requeue: the request is fulfilled."""
        if self._folder is not None and world()[0] == 0:
            (self._folder / REQUEUE_FILE).unlink(missing_ok=True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While in it, a request raises `StopRequested`."""
        self._num_waits += 1
        self._is_interruptible = True
        try:
            if self.received:
                raise StopRequested
            yield
        finally:
            self._is_interruptible = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._folder is None:
            if self._is_first_of_host:
                report(
                    f"Interrupted: asked to stop ({signal.Signals(number).name}) before training began, nothing is "
                    "lost; start the same command to continue"
                )
            end_process(EXIT_REQUEUE, is_recorded=False)  # the signal may come because another rank has failed
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        if self._request == StopRequest.NONE:
            self._request, self.name = StopRequest.REQUEUE, signal.Signals(number).name
        if self._is_interruptible:
            self._is_interruptible = False  # a second one must not raise where nobody catches it
            raise StopRequested
