"""Heartbeats of every rank, and an end to a step that no rank gets out of.

    RUN/heartbeats/rank_00000.json    {"rank", "host", "pid", "step", "phase", "beats", "since", "time"}: times in seconds
                                      since 1970; since: when the rank entered the phase; beats: phases entered so far
    RUN/stacks/rank_00000.txt         what each thread was doing when the rank gave up

In a collective all ranks wait for the one that does not come. When this rank has made no progress for a bound, it
writes its stacks, the ranks that hold up the others are named, and the process ends with a status of its own: the
launcher then ends the others, and the job starts again from its last checkpoint.

Source: torch.distributed's flight recorder for the idea; Python's faulthandler for the stacks.
"""

import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from unimo3.distributed import world
from unimo3.errors import EXIT_STALLED

log = logging.getLogger(__name__)

HEARTBEATS, STACKS = "heartbeats", "stacks"
# Compiling, verifying and writing take longer than a step.
_PATIENCE = {"start": 4.0, "save": 4.0}
_NUM_NAMED = 4


@dataclass(frozen=True)
class Heartbeat:
    """What one rank was doing."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beats: int
    since: float
    time: float


class Watch:
    """This rank's heartbeat and the watch over it; a thread of its own does both.

    Args:
        run: the run's folder.
        bound_s: seconds without progress after which the rank gives up. 0: never.
        poll: called every second or so.
    """

    def __init__(self, run: Path, bound_s: float, poll: Callable[[], None]):
        self._run, self._bound_s, self._poll = run, bound_s, poll
        self._rank, size = world()
        self._interval_s = max(1.0, size / 200)  # many ranks share the folder's server
        if bound_s:
            self._interval_s = min(self._interval_s, bound_s / 4)
        self._step, self._phase, self._beats, self._since = 0, "start", 0, time.time()
        self._ends = threading.Event()
        for name in (HEARTBEATS, STACKS):
            (run / name).mkdir(parents=True, exist_ok=True)
        (run / STACKS / _file_of(self._rank, "txt")).unlink(missing_ok=True)
        if self._rank == 0:
            _forget_ranks_from(run, size)
        # Asked by hand: scancel --signal=QUIT writes every rank's stacks to the job's output.
        faulthandler.register(signal.SIGQUIT, all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int) -> None:
        """Say that a phase of a step begins; this is progress. Every rank says it at the same points of the program."""
        self._phase, self._step, self._beats, self._since = phase, step, self._beats + 1, time.time()

    def close(self) -> None:
        """End the watch; the last heartbeat says that the rank has ended."""
        self._ends.set()
        self._thread.join(5)
        self.beat("ended", self._step)
        self._write()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ends.wait(self._interval_s):
            now = time.monotonic()
            if now - last > 10 * self._interval_s + 5:
                # The whole process was stopped, as when a scheduler suspends a job: that is nobody's stall.
                self._since = time.time()
            last = now
            self._write()
            self._poll()
            if self._bound_s and time.time() - self._since > self._bound_s * _PATIENCE.get(self._phase, 1.0):
                self._give_up()

    def _write(self) -> None:
        beat = Heartbeat(
            self._rank, socket.gethostname(), os.getpid(), self._step, self._phase, self._beats, self._since, time.time()
        )
        path = self._run / HEARTBEATS / _file_of(self._rank, "json")
        staging = path.with_suffix(".tmp")
        try:
            staging.write_text(json.dumps(asdict(beat)) + "\n")
            staging.replace(path)
        except OSError as error:  # a full disk is the checkpoint's to report
            log.debug("%s: %s", path, error)

    def _give_up(self) -> None:
        try:
            with (self._run / STACKS / _file_of(self._rank, "txt")).open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.error("stacks cannot be written (%s)", error)
        self._ends.wait(3 * self._interval_s)  # for the others' stacks
        beats = read_heartbeats(self._run)
        alive = [beat.rank for beat in beats if time.time() - beat.time < 10 * self._interval_s]
        if self._rank == min(alive, default=self._rank):
            log.error("%s", describe_stall(beats, self._bound_s, 5 * self._interval_s, self._run))
        logging.shutdown()
        os._exit(EXIT_STALLED)


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """Every rank's last heartbeat, in the order of ranks; what cannot be read is left out."""
    found = []
    for path in sorted((run / HEARTBEATS).glob("rank_*.json")):
        try:
            found.append(Heartbeat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return found


def describe_stall(beats: list[Heartbeat], bound_s: float, silent_s: float, run: Path) -> str:
    """Which ranks hold up the others: those that are silent, else the furthest behind.

    Clocks say nothing of that: a rank may enter a phase before another does and still be the one that waits.
    """
    now = time.time()
    silent = [beat for beat in beats if now - beat.time > silent_s]
    fewest = min((beat.beats for beat in beats), default=0)
    suspects = silent or [beat for beat in beats if beat.beats == fewest]
    named = [
        f"rank {beat.rank} on {beat.host} (pid {beat.pid}) in phase '{beat.phase}' of step {beat.step} for "
        f"{now - beat.since:.0f} s" + (f", silent for {now - beat.time:.0f} s{_state_of(beat)}" if silent else "")
        for beat in suspects[:_NUM_NAMED]
    ]
    more = f" and {len(suspects) - _NUM_NAMED} more" if len(suspects) > _NUM_NAMED else ""
    return (
        f"no progress for {bound_s:g} s (training.stall_after_s); the others wait for {'; '.join(named)}{more}. Every "
        f"rank's stacks are in {run / STACKS}; ending, to start again from the last checkpoint"
    )


def _state_of(beat: Heartbeat) -> str:
    """What this host's kernel says of a silent process, if it is on this host."""
    if beat.host != socket.gethostname():
        return ""
    try:
        lines = Path(f"/proc/{beat.pid}/status").read_text().splitlines()
    except OSError:
        return ", its process is gone"
    return next((f", its process is {line.split(None, 1)[1]}" for line in lines if line.startswith("State:")), "")


def _file_of(rank: int, kind: str) -> str:
    return f"rank_{rank:05d}.{kind}"


def _forget_ranks_from(run: Path, size: int) -> None:
    """Remove what ranks of an earlier, larger start left."""
    for folder in (HEARTBEATS, STACKS):
        for path in (run / folder).glob("rank_*"):
            if path.stem.removeprefix("rank_").isdigit() and int(path.stem.removeprefix("rank_")) >= size:
                path.unlink(missing_ok=True)
