"""What Slurm reports of jobs: one job's state, all jobs of the project's scripts, and the jobs of one folder.

Slurm reports each job's command and folder as they were submitted, so a job's run is found without notes that could go
stale. The words' quotes are lost: a value reaches to the next word that begins with ``--``.

Source: squeue(1), %o and %Z.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurm import history
from slurm.commands import output_of
from slurm.runs import ArgumentError, work_folder

# A job whose script runs, although a user may have stopped, signalled or resized it; one whose processes may be there;
# and one that has or may again have the run's folder to itself.
RUNNING = ("RUNNING", "STOPPED", "SIGNALING", "RESIZING")
AT_WORK = (*RUNNING, "COMPLETING", "SUSPENDED", "STAGE_OUT")
ACTIVE = (*AT_WORK, "PENDING", "CONFIGURING")

_SCRIPT = re.compile(r"(?:^|/)(pretrain|finetune|export|prepare_shards)\.sbatch(?: |$)")
_PROGRAMS = {"pretrain": "pretrain.train", "export": "pretrain.export", "prepare_shards": "pretrain.prepare_shards"}


def ask(job: str, form: str = "%T") -> str:
    """A job's first line in squeue's `form`, its state by default; empty if Slurm has forgotten it or is not here."""
    try:
        stdout = output_of("squeue", "--noheader", f"--jobs={job}", "--states=all", f"--format={form}")
    except (OSError, subprocess.SubprocessError):
        return ""
    return stdout.strip().split("\n")[0]


@dataclass(frozen=True)
class Queued:
    """A job of the project's scripts that Slurm has; an array counts as one."""

    job: str
    state: str
    folder: Path


def queued() -> list[Queued]:
    """All jobs of the project's scripts, running ones too; none where there is no Slurm.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    try:
        stdout = output_of("squeue", "--noheader", "--format=%F|%T|%Z|%o")
    except FileNotFoundError:
        return []
    jobs: list[Queued] = []
    for line in stdout.splitlines():
        job, state, start, words = (*line.split("|", 3), "", "", "")[:4]
        folder = _folder_of(Path(start), words)
        if folder is not None:
            jobs.append(Queued(job, state, folder.resolve()))
    return jobs


def jobs_on(folder: Path, known: list[Queued] | None = None) -> dict[str, str]:
    """Jobs whose command works on a folder, each with its state; none where there is no Slurm.

    Args:
        known: what `queued` has just returned.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    jobs = queued() if known is None else known
    states = {one.job: one.state for one in jobs if one.folder == folder.resolve()}
    # One of another command, such as a script around the project's, is known once it has begun.
    for attempt in history.read(folder)[-1:]:
        if (job := attempt.job.partition("_")[0]) not in states and (state := ask(attempt.job)) in ACTIVE:
            states[job] = state
    return states


def _folder_of(start: Path, command: str) -> Path | None:
    """The folder a job's command works on; None: it is not one of the project's, or names no folder."""
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
    """The words, with values that contain spaces joined again."""
    joined: list[str] = []
    takes_any = False  # the word after a key is its value, however it begins
    for word in words:
        if takes_any or word.startswith("--") or not joined or (joined[-1].startswith("--") and "=" not in joined[-1]):
            joined.append(word)
            takes_any = word.startswith("--") and "=" not in word and not takes_any
        else:
            joined[-1] += f" {word}"
    return joined


@dataclass(frozen=True)
class Queue:
    """All queued jobs, as Slurm reports them.

    Attributes:
        jobs: None: Slurm gave no answer.
        error: why it gave none.
    """

    jobs: list[Queued] | None
    error: str = ""

    def has_job_on(self, run: Path) -> bool:
        """Whether a job is queued for a run."""
        return any(one.folder == run.resolve() for one in self.jobs or [])


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


def read_queue() -> Queue:
    """Ask Slurm once for all jobs."""
    if shutil.which("squeue") is None:
        return Queue(None, "there is no squeue on this machine to ask")
    try:
        return Queue(queued())
    except (OSError, subprocess.SubprocessError) as error:
        return Queue(None, f"Slurm does not answer ({message_of(error)})")


def jobs_of(run: Path, attempts: list[history.Attempt], queue: Queue) -> list[Job]:
    """A run's jobs, that of its last start first."""
    last = attempts[-1].job if attempts else ""
    if queue.jobs is None:
        return [Job(last, "UNKNOWN", queue.error)] if last else []
    listed = jobs_on(run, queue.jobs)
    # The link of an array that has begun is more precise than the array, while Slurm has it.
    if last.partition("_")[0] in listed and ask(last) in ACTIVE:
        listed = {last: listed.pop(last.partition("_")[0])} | listed
    return [_job(number, state) for number, state in (listed or ({last: "ENDED"} if last else {})).items()]


def may_run(jobs: list[Job], queue: Queue) -> bool:
    """Whether a start whose end is not recorded may still run."""
    return queue.jobs is None or any(job.state in AT_WORK for job in jobs)


def _job(number: str, otherwise: str) -> Job:
    answer = ask(number, "%T|%r|%N|%k").split("|", 3)
    state, reason, nodes, comment = (*answer, "", "", "", "")[:4]
    reason, comment = ("" if words in ("None", "(null)") else words.strip() for words in (reason, comment))
    return Job(number, state or otherwise, reason, nodes, comment)


def message_of(error: Exception) -> str:
    """The last line of what a command of Slurm printed of its failure."""
    stderr = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return (stderr or str(error)).strip().splitlines()[-1]
