"""Jobs that Slurm has, queued or at work, on one folder.

Slurm tells each job's command as it was submitted, by whatever way, and where; so nothing has to be noted of a job that
could go stale. The words' quotes are lost: a value reaches to the next word that begins with ``--``. Not seen is a job
submitted in one copy of the project for another that UNIMO3_ROOT names, if the folder is given relative to that.

Source: squeue(1), %o and %Z.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurm import history, queue
from slurm.runs import ArgumentError, work_folder

_ROOT, _COMMON = Path(__file__).parents[1], Path("slurm") / "common.sh"
_SCRIPT = re.compile(r"(?:^|/)(pretrain|finetune|export|prepare_shards)\.sbatch(?: |$)")
_PROGRAMS = {"pretrain": "pretrain.train", "export": "pretrain.export", "prepare_shards": "pretrain.prepare_shards"}


@dataclass(frozen=True)
class Queued:
    """A job of the project's scripts that Slurm has; of an array the array."""

    job: str
    state: str
    folder: Path


def queued() -> list[Queued]:
    """All of them, those at work too; none where there is no Slurm.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    command = ["squeue", "--noheader", "--format=%F|%T|%Z|%o"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except FileNotFoundError:
        return []
    found: list[Queued] = []
    for line in told.splitlines():
        job, state, start, words = (*line.split("|", 3), "", "", "")[:4]
        folder = _folder_of(_root(Path(start)), words)
        if folder is not None:
            found.append(Queued(job, state, folder.resolve()))
    return found


def jobs_on(folder: Path, known: list[Queued] | None = None) -> dict[str, str]:
    """Jobs whose command works on a folder, each with its state; none where there is no Slurm.

    Args:
        known: what `queued` has just told.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    jobs = queued() if known is None else known
    found = {one.job: one.state for one in jobs if one.folder == folder.resolve()}
    # One of another command, such as a script around the project's, is known once it has begun.
    for attempt in history.read(folder)[-1:]:
        if (job := attempt.job.partition("_")[0]) not in found and (state := queue.ask(attempt.job)) in queue.ACTIVE:
            found[job] = state
    return found


def _root(start: Path) -> Path:
    """Where a job's script starts its program: where it was submitted, or what UNIMO3_ROOT named.

    Slurm does not tell a job's environment. Submitted elsewhere a job is held, unless UNIMO3_ROOT names the project.
    """
    return start if (start / _COMMON).is_file() else _ROOT


def _folder_of(start: Path, command: str) -> Path | None:
    """What a job's command works on; None: it is none of the project's, or says no folder."""
    script = _SCRIPT.search(command)
    if not script:
        return None
    words = command[script.end() :].split(" ")
    program = _PROGRAMS.get(script[1]) or f"finetune.{words.pop(0)}"
    try:
        return work_folder(program, _joined(words), start)
    except (ArgumentError, OSError):
        return None


def _joined(words: list[str]) -> list[str]:
    """Words of which those that a space within a value has parted are together again."""
    joined: list[str] = []
    takes_any = False  # the word after a key is its value, however it begins
    for word in words:
        if takes_any or word.startswith("--") or not joined or (joined[-1].startswith("--") and "=" not in joined[-1]):
            joined.append(word)
            takes_any = word.startswith("--") and "=" not in word and not takes_any
        else:
            joined[-1] += f" {word}"
    return joined
