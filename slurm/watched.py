"""Which jobs are a run's, and what Slurm says of them: those that are queued for it, else the last that began there.

Source: squeue(1).
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurm import history, queue
from slurm.rivals import Queued, jobs_on, queued


@dataclass(frozen=True)
class Told:
    """What Slurm has told of all jobs.

    Attributes:
        queued: None: it gave no answer.
        silence: why it gave none, in words.
    """

    queued: list[Queued] | None
    silence: str = ""

    def names(self, run: Path) -> bool:
        """Whether a job is queued for a run."""
        return any(one.folder == run.resolve() for one in self.queued or [])


@dataclass(frozen=True)
class Job:
    """A job as Slurm has it.

    Attributes:
        state: such as ``PENDING``; ``ENDED``: Slurm has forgotten it; ``UNKNOWN``: it gives no answer.
        reason: Slurm's, for which it waits or ended, such as ``Resources``.
        nodes: those it runs on.
        comment: why the project's scripts hold it.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    comment: str = ""


def ask_all() -> Told:
    """Ask Slurm once for all jobs."""
    if shutil.which("squeue") is None:
        return Told(None, "there is no squeue on this machine to ask")
    try:
        return Told(queued())
    except (OSError, subprocess.SubprocessError) as error:
        return Told(None, f"Slurm does not answer ({_words(error)})")


def of_run(run: Path, attempts: list[history.Attempt], told: Told) -> list[Job]:
    """A run's jobs, that of its last start first."""
    last = attempts[-1].job if attempts else ""
    if told.queued is None:
        return [Job(last, "UNKNOWN", told.silence)] if last else []
    listed = jobs_on(run, told.queued)
    # Of an array the link that has begun says more than the array, while it is there.
    if last.partition("_")[0] in listed and queue.ask(last) in queue.ACTIVE:
        listed = {last: listed.pop(last.partition("_")[0])} | listed
    return [_job(number, state) for number, state in (listed or ({last: "ENDED"} if last else {})).items()]


def may_run(jobs: list[Job], told: Told) -> bool:
    """Whether a start that has told no end may be at work."""
    return told.queued is None or any(job.state in queue.AT_WORK for job in jobs)


def _job(number: str, otherwise: str) -> Job:
    answer = queue.ask(number, "%T|%r|%N|%k").split("|", 3)
    state, reason, nodes, comment = (*answer, "", "", "", "")[:4]
    reason, comment = ("" if words in ("None", "(null)") else words.strip() for words in (reason, comment))
    return Job(number, state or otherwise, reason, nodes, comment)


def _words(error: Exception) -> str:
    told = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return (told or str(error)).strip().splitlines()[-1]
