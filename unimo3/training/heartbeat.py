"""What every rank was doing last, and which of them the others wait for.

    RUN/heartbeats/rank_00000.json    {"rank", "host", "pid", "step", "phase", "beats", "since", "time"}: times in
                                      seconds since 1970 by the rank's own clock; since: when it entered the phase;
                                      beats: phases entered so far
    RUN/heartbeats/rank_00000.lock    host and pid of the process that has it locked, see `lock_run`

Source: torch.distributed's flight recorder for the idea.
"""

import fcntl
import json
import os
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from unimo3.atomic_write import naming, replace_text
from unimo3.errors import ConfigError

HEARTBEATS = "heartbeats"
_NUM_NAMED = 4
# Age of a live process's heartbeat. Rank 0 writes its own every few seconds. Other ranks of a large run do so seldom; a
# second start of the run is then refused by its rank 0.
_RECENT_S = 30.0
# Longer than the 90 s after which a server of NFS gives up a client.
_LOCK_WAIT_S = 150.0


def poll_interval_s(num_ranks: int) -> float:
    """Seconds between two looks at the run's folder by rank 0, which also writes its heartbeat then."""
    return min(5.0, max(1.0, num_ranks / 200))


def heartbeat_interval_s(num_ranks: int) -> float:
    """Seconds between two heartbeats of a rank other than 0: all ranks together write about 13 a second at most.

    A heartbeat is four operations on the folder's server: open, write, close, rename.
    """
    return max(1.0, num_ranks / 13)


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

    @property
    def is_here(self) -> bool:
        """Whether the rank runs on this host."""
        return self.host == socket.gethostname()

    def state(self) -> str | None:
        """The process's state in this host's kernel, such as ``T (stopped)``; None: no such process."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), None)

    def is_alive(self) -> bool:
        """Whether this host has the process, and it has not ended."""
        state = self.state()
        return state is not None and not state.startswith(("Z", "X"))


def write_heartbeat(run: Path, rank: int, step: int, phase: str, beats: int, since: float) -> None:
    """Leave this process's heartbeat in its run's folder.

    Raises:
        OSError: it cannot be written.
    """
    beat = Heartbeat(rank, socket.gethostname(), os.getpid(), step, phase, beats, since, time.time())
    replace_text(_path(run, rank), json.dumps(asdict(beat)) + "\n")


def _path(run: Path, rank: int) -> Path:
    return run / HEARTBEATS / f"rank_{rank:05d}.json"


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """Every rank's last heartbeat, in the order of ranks; what cannot be read is skipped.

    Times are by this host's clock: hosts' clocks differ, so the file server's decides how old a heartbeat is.
    """
    return _read(run, sorted((run / HEARTBEATS).glob("rank_*.json")))


def _read(run: Path, paths: list[Path]) -> list[Heartbeat]:
    beats: list[Heartbeat] = []
    ahead_s = server_is_ahead_s(run / HEARTBEATS)
    for path in paths:
        with suppress(OSError, ValueError, TypeError), path.open() as file:
            beat = Heartbeat(**json.load(file))
            written = os.fstat(file.fileno()).st_mtime - ahead_s
            beats.append(replace(beat, time=written, since=beat.since + written - beat.time))
    return beats


def server_is_ahead_s(folder: Path) -> float:
    """Seconds by which the clock of the folder's file server, which dates its files, is ahead of this host's."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as file:
        before = time.time()
        file.write(b"1")
        file.flush()
        os.fsync(file.fileno())  # else a client of NFS answers by its own clock
        return os.fstat(file.fileno()).st_mtime - before
    return 0.0


def other_process(run: Path) -> Heartbeat | None:
    """The heartbeat of a process other than this one that uses the run now; None: none is visible.

    Every rank reads that of its own rank number, which no other process of its start writes.
    """
    rank = int(os.environ.get("RANK", "0"))
    for beat in _read(run, [_path(run, rank)] if _path(run, rank).exists() else []):
        is_recent = beat.rank == rank and beat.phase != "ended" and time.time() - beat.time < _RECENT_S
        if is_recent and not (beat.is_here and (beat.pid == os.getpid() or not beat.is_alive())):
            return beat
    return None


_locked: list[TextIO] = []  # until this process ends


def lock_run(run: Path) -> None:
    """Lock a run for this rank until the process ends, so that no two processes train it; every rank calls it.

    The kernel, or the server of a shared file system, releases the lock however the process ends. After the loss of a
    node, a server does so only when it misses the node; a job of Slurm, which may be requeued by then, waits for it.

    Raises:
        ConfigError: another process uses the run, or its folder cannot be written.
    """
    path = run / HEARTBEATS / f"rank_{int(os.environ.get('RANK', '0')):05d}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(
            f"run.dir: '{path.parent}': cannot be written ({error.strerror}); check space, quota and permissions, or "
            "choose another run.dir"
        ) from error
    is_slurm = "UNIMO3_STATUS_DIR" in os.environ
    ends = time.monotonic() + (_LOCK_WAIT_S if is_slurm else 0.0)
    has_locks = True
    try:
        while not _is_locked(file):
            if time.monotonic() >= ends:
                file.seek(0)
                raise ConfigError(_in_use(run, file.read().strip() or "another process"))
            time.sleep(1.0)
    except OSError:
        has_locks = False  # of the file system: heartbeats are all there is
    beat = None if is_slurm and has_locks else other_process(run)
    while beat is not None and time.monotonic() < ends:
        time.sleep(1.0)
        beat = other_process(run)
    if beat is not None:
        user = f"pid {beat.pid} on {beat.host}"
        raise ConfigError(f"{_in_use(run, user)}; after a crash try again in {_RECENT_S:.0f} s")
    _locked.append(file)
    with naming(path):
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _is_locked(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _in_use(run: Path, user: str) -> str:
    return (
        f"run.name: {run}: {user} uses this run; wait for its end, stop it (touch {run / 'stop'} or kill the process), "
        "or choose another run.name"
    )


def describe_suspects(beats: list[Heartbeat], num_ranks: int, started: float, silent_s: float) -> str:
    """Which ranks the others wait for: those that never came, else the silent ones, else those furthest behind.

    Clocks do not show who is behind: a rank may enter a phase before another does and still be the one that waits.

    Args:
        beats: all heartbeats, some perhaps of an earlier start.
        num_ranks: how many ranks there should be.
        started: when this start began, seconds since 1970.
        silent_s: seconds without a heartbeat after which a rank counts as silent.
    """
    now = time.time()
    beats = [beat for beat in beats if beat.time >= started - silent_s]
    if absent := sorted(set(range(num_ranks)) - {beat.rank for beat in beats}):
        return _some([f"rank {rank}, which has written no heartbeat since this start" for rank in absent])
    if silent := [beat for beat in beats if now - beat.time > silent_s]:
        return _some([f"{_describe(beat, now)}, silent for {now - beat.time:.0f} s{_fate(beat)}" for beat in silent])
    fewest = min(beat.beats for beat in beats)
    return _some([_describe(beat, now) for beat in beats if beat.beats == fewest])


def _describe(beat: Heartbeat, now: float) -> str:
    return (
        f"rank {beat.rank} on {beat.host} (pid {beat.pid}) in phase '{beat.phase}' of step {beat.step} for "
        f"{now - beat.since:.0f} s"
    )


def _fate(beat: Heartbeat) -> str:
    if not beat.is_here:
        return ""
    state = beat.state()
    return f", its process is {state}" if state else ", its process is gone"


def _some(named: list[str]) -> str:
    more = f" and {len(named) - _NUM_NAMED} more" if len(named) > _NUM_NAMED else ""
    return "; ".join(named[:_NUM_NAMED]) + more
