"""Which start of a job has a folder to itself: RUN/slurm/starts/000001, 000002...; the last one counts.

Two jobs that begin at the same instant must not both have it, on a shared file system too, where locks of flock(2) may
work within one node only. A start makes the file of the next number by link(2), which the file system's server grants
once; a second start then reads the new file. No file is ever replaced or removed, so a file that was just read stays
valid. A file does not block the next start if its own start has ended or Slurm no longer has its job at work.

Source: open(2), O_EXCL, on locks over NFS.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from slurm import history

FOLDER = "starts"
_NUM_LOOKS, _LOOK_S = 50, 0.1


def acquire(run: Path, job: str, restart: int, is_at_work: Callable[[str], bool]) -> str | None:
    """Acquire the folder for a start of a job.

    Args:
        restart: how often Slurm has started the job before.
        is_at_work: whether another job's processes may still be there.

    Returns:
        The other job that has the folder; None: this job has it now.
    """
    folder = run / history.FOLDER / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{socket.gethostname()}-{os.getpid()}"
    staging.write_text(f"{job} {restart}\n")
    try:
        number = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
        while True:
            if number:
                other, its_restart = _holder(folder / f"{number:06d}")
                if other != job and not _has_ended(run, other, its_restart) and is_at_work(other):
                    return other
            number += 1
            if _link(staging, folder / f"{number:06d}"):
                return None
    finally:
        staging.unlink()


def _link(staging: Path, target: Path) -> bool:
    try:
        target.hardlink_to(staging)
    except FileExistsError:
        # NFS may have made it and lost the answer.
        return staging.stat().st_nlink > 1
    return True


def _holder(path: Path) -> tuple[str, int]:
    """Job and restart; a file that another node has just made may take a moment to be seen."""
    for _ in range(_NUM_LOOKS):
        try:
            job, restart = path.read_text().split()
        except FileNotFoundError:
            time.sleep(_LOOK_S)
        else:
            return job, int(restart)
    raise FileNotFoundError(f"{path}: exists and cannot be seen; is the run's folder on storage that all nodes share?")


def _has_ended(run: Path, job: str, restart: int) -> bool:
    starts = [attempt for attempt in history.read(run) if (attempt.job, attempt.restart) == (job, restart)]
    return bool(starts) and starts[-1].action is not None
