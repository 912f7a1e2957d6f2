"""Jobs that Slurm has, queued or at work, on one folder.

Slurm tells each job's command as it was submitted, by whatever way, and where; so nothing has to be noted of a job that
could go stale. The words' quotes are lost: a value reaches to the next word that begins with ``--``.

Source: squeue(1), %o and %Z.
"""

import re
import subprocess
from pathlib import Path

from slurm import history, queue
from slurm.runs import ArgumentError, work_folder

_SCRIPT = re.compile(r"(?:^|/)(pretrain|finetune|export|prepare_shards)\.sbatch(?: |$)")
_PROGRAMS = {"pretrain": "pretrain.train", "export": "pretrain.export", "prepare_shards": "pretrain.prepare_shards"}


def jobs_on(folder: Path) -> dict[str, str]:
    """Jobs whose command works on a folder, each with its state; none where there is no Slurm.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    command = ["squeue", "--noheader", "--format=%F|%T|%Z|%o"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except FileNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in told.splitlines():
        job, state, start, words = (*line.split("|", 3), "", "", "")[:4]
        its_folder = _folder_of(Path(start), words)
        if its_folder is not None and its_folder.resolve() == folder.resolve():
            found[job] = state
    # One of another command, such as a script around the project's, is known once it has begun.
    for attempt in history.read(folder)[-1:]:
        if (job := attempt.job.partition("_")[0]) not in found and (state := queue.ask(attempt.job)) in queue.ACTIVE:
            found[job] = state
    return found


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
