"""Which start of a job has a folder to itself: RUN/slurm/starts/000001, 000002...; the last one counts.

Two jobs that begin at the same instant must not both have it, on a shared file system too, where locks of flock(2) may
work within one node only. A start makes the file of the next number by link(2), which the file system's server grants
once; a second start then reads the new file. No file is ever replaced or removed, so a file that was just read stays
valid. A file does not block the next start if its own start has ended or Slurm no longer has its job at work. Where a
file system has no links, open(2) with O_EXCL makes the file, which is empty for a moment.

Source: open(2), O_EXCL, on locks over NFS.
"""

import errno
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from slurm import history

FOLDER = "starts"
_NUM_LOOKS, _LOOK_S = 50, 0.1
# What file systems without hard links answer, such as FAT, some FUSE and some object stores' mounts.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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
    # Containers of one host may have equal process ids.
    staging = folder / f".{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    staging.write_text(f"{job} {restart}\n")
    try:
        number = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
        while True:
            holder = _holder(folder / f"{number:06d}") if number else None
            if holder is not None:
                other, its_restart = holder
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
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with target.open("x") as file:
                file.write(staging.read_text())
        except FileExistsError:
            return False
    return True


def _holder(path: Path) -> tuple[str, int] | None:
    """Job and restart; None: the start was killed before it wrote them.

    What another node has just made or written may take a moment to be seen.
    """
    is_there = False
    for _ in range(_NUM_LOOKS):
        with suppress(FileNotFoundError):
            words = path.read_text().split()
            if len(words) == 2:
                return words[0], int(words[1])
            is_there = True
        time.sleep(_LOOK_S)
    if is_there:
        return None
    raise FileNotFoundError(
        f"{path}: exists but is not visible on this node; is the run's folder on storage that all nodes share?"
    )


def _has_ended(run: Path, job: str, restart: int) -> bool:
    starts = [attempt for attempt in history.read(run) if (attempt.job, attempt.restart) == (job, restart)]
    return bool(starts) and starts[-1].action is not None
