"""Ends a step in which all ranks hang.

    RUN/stacks/rank_00000.txt         what each thread was doing when the rank gave up
    RUN/stacks/asked_00000.txt        the same, at each SIGQUIT

In a collective all ranks wait for the one that does not come. When this rank has made no progress for a bound, it
writes its stack traces, the ranks that delay the others are named from their heartbeats, and the process exits with
status 71: the launcher then ends the others, and the job starts again from its last checkpoint.

Source: torch.distributed's watchdog for the idea; Python's faulthandler for the stack traces.
"""

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from unimo3.errors import EXIT_STALLED, record_end
from unimo3.training.heartbeat import (
    HEARTBEATS,
    Heartbeat,
    describe_suspects,
    heartbeat_interval_s,
    poll_interval_s,
    read_heartbeats,
    write_heartbeat,
)

log = logging.getLogger(__name__)

STACKS = "stacks"
# Joining, loading, compiling and writing take longer than a step.
_PATIENCE = {"join": 4.0, "build": 4.0, "start": 4.0, "save": 4.0}
# Time limit of the reports of a process that gives up: the folder it writes to may hang.
_REPORTING_S = 10.0


class Watch:
    """This rank's heartbeat and the watch over its progress, from the start of the process.

    Two threads: what hangs on the run's folder, as heartbeats may, must not stop the watch. Rank and size come from the
    environment, because joining the other ranks is watched too.

    Args:
        run: the run's folder.
        bound_s: seconds without progress after which the rank gives up. 0: never.
        poll: called every few seconds.
    """

    def __init__(self, run: Path, bound_s: float, poll: Callable[[], None]):
        self._run, self._bound_s, self._poll = run, bound_s, poll
        self._rank, self._size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._interval_s = poll_interval_s(self._size)
        self._beat_interval_s = self._interval_s if self._rank == 0 else heartbeat_interval_s(self._size)
        if bound_s:
            self._interval_s = min(self._interval_s, bound_s / 4)
            self._beat_interval_s = min(self._beat_interval_s, bound_s / 4)
        self._step, self._phase, self._beats, self._since = 0, "join", 0, time.time()
        # Times of the start and the last progress; the time of day may be set meanwhile.
        self._started_s = self._progress_s = time.monotonic()
        self._ends = threading.Event()
        faulthandler.register(signal.SIGQUIT, all_threads=True)  # to the output until the folder is there
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._heartbeats, self._watch)]
        for thread in self._threads:
            thread.start()

    def beat(self, phase: str, step: int) -> None:
        """Record that a phase of a step begins; this is progress. Every rank does so at the same points."""
        self._phase, self._step, self._beats, self._since = phase, step, self._beats + 1, time.time()
        self._progress_s = time.monotonic()

    def close(self) -> None:
        """End the watch; the last heartbeat reports that the rank has ended."""
        self._ends.set()
        for thread in self._threads:
            thread.join(5)
        self.beat("ended", self._step)
        self._write()

    def _heartbeats(self) -> None:
        """Heartbeats and the poll, until the end."""
        try:
            self._clean()
            # Asked by hand, as by scancel --signal=QUIT: a file a rank, since all ranks' would be mixed in the output.
            asked = (self._run / STACKS / f"asked_{self._rank:05d}.txt").open("w", buffering=1)
            asked.write(f"rank {self._rank} on {socket.gethostname()}, pid {os.getpid()}\n")
            faulthandler.register(signal.SIGQUIT, asked, all_threads=True)
        except OSError as error:
            log.debug("%s: %s", self._run, error)
        self._write()
        # Ranks that start together do not write together.
        written = time.monotonic() - self._beat_interval_s * (self._rank / self._size)
        while not self._ends.wait(self._interval_s):
            now = time.monotonic()
            if now - written >= self._beat_interval_s:
                self._write()
                written = now
            self._poll()

    def _clean(self) -> None:
        """Remove this rank's stack traces of an earlier start, and on rank 0 files of ranks that this start lacks."""
        for folder in (HEARTBEATS, STACKS):
            (self._run / folder).mkdir(parents=True, exist_ok=True)
            for path in (self._run / folder).glob("*_*") if self._rank == 0 else ():
                number = path.stem.rpartition("_")[2]
                if number.isdigit() and int(number) >= self._size:
                    path.unlink(missing_ok=True)
        self._stacks.unlink(missing_ok=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ends.wait(self._interval_s):
            now = time.monotonic()
            if now - last > 10 * self._interval_s + 5:
                # The process itself was stopped, as when a scheduler suspends a job: that is no stall.
                self._since, self._progress_s = time.time(), now
            last = now
            if self._bound_s and now - self._progress_s > self._bound_s * _PATIENCE.get(self._phase, 1.0):
                self._give_up()

    def _write(self) -> None:
        try:
            write_heartbeat(self._run, self._rank, self._step, self._phase, self._beats, self._since)
        except OSError as error:  # saving a checkpoint reports a full disk
            log.debug("%s: %s", self._run, error)

    @property
    def _stacks(self) -> Path:
        return self._run / STACKS / f"rank_{self._rank:05d}.txt"

    def _give_up(self) -> None:
        limit_s = _REPORTING_S + 3 * self._interval_s
        for wait_s, act in ((limit_s, self._report_hanging_folder), (limit_s + 5, lambda: os._exit(EXIT_STALLED))):
            timer = threading.Timer(wait_s, act)
            timer.daemon = True
            timer.start()
        try:
            with self._stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.error("stack traces cannot be written (%s)", error)
        self._ends.wait(3 * self._interval_s)  # for the others' stack traces
        beats = read_heartbeats(self._run)
        started = time.time() - (time.monotonic() - self._started_s)
        alive = [beat.rank for beat in beats if time.time() - beat.time < 9 * self._interval_s + self._beat_interval_s]
        if self._rank == min(alive, default=self._rank):
            silent_s = 4 * self._interval_s + self._beat_interval_s
            suspects = describe_suspects(beats, self._size, started, silent_s)
            message = f"no progress for {self._bound_s:g} s (training.stall_after_s); the others wait for {suspects}"
            log.error(
                "%s. Every rank's stack traces are in %s. Exiting, so that the job restarts from the last checkpoint",
                message,
                self._run / STACKS,
            )
            record_end(EXIT_STALLED, message)
        if any(_wake(beat) for beat in beats if beat.time > started and beat.rank != self._rank):
            time.sleep(1.0)
        logging.shutdown()
        os._exit(EXIT_STALLED)

    def _report_hanging_folder(self) -> None:
        log.error(
            "rank %d: no progress for %g s (training.stall_after_s) in phase '%s' of step %d, and %s does not answer: "
            "check its file system; stack traces follow. Exiting, so that the job restarts from the last checkpoint",
            self._rank,
            self._bound_s,
            self._phase,
            self._step,
            self._run,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_STALLED)


def _wake(beat: Heartbeat) -> bool:
    """Have a stopped process of this host write its stack traces: no other process can, and it is about to be ended."""
    if not beat.is_here or not (beat.state() or "").startswith("T"):
        return False
    try:
        os.kill(beat.pid, signal.SIGQUIT)
        os.kill(beat.pid, signal.SIGCONT)
    except OSError:
        return False
    return True
