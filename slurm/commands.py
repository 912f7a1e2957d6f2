"""Slurm's commands, called without what a user's environment sets for them.

SQUEUE_PARTITION and the like filter answers, and SLURM_TIME_FORMAT changes them. A job submitted inside another job
would inherit the SLURM_* variables of that job.

Source: squeue(1), scontrol(1) and sbatch(1), INPUT ENVIRONMENT VARIABLES.
"""

import os
import subprocess

# Begins the line that a job script reads: a container or BASH_ENV may print others.
ANSWER = "answer:"
_TIMEOUT_S = 60
_OF_QUERIES = ("SQUEUE_", "SINFO_", "SCONTROL_", "SLURM_TIME_FORMAT")
_OF_JOBS = ("SLURM_", "SBATCH_", "UNIMO3_RANKS_PER_NODE", "UNIMO3_STATUS_DIR")
# Where Slurm is and who asks, not what a job is.
_CONNECTION = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")


def print_answer(*words: object) -> None:
    """Print the line that a job script reads, on a line of its own whatever has been printed before."""
    print()
    print(ANSWER, *words)


def output_of(*command: str) -> str:
    """What a query of Slurm prints.

    Raises:
        OSError, subprocess.SubprocessError: it failed or gave no answer.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_QUERIES)}
    stdout = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=True
    ).stdout
    # With SLURM_CLUSTERS each cluster's answer has a heading.
    return "".join(line for line in stdout.splitlines(True) if not line.startswith("CLUSTER: "))


def job_environment() -> tuple[dict[str, str], list[str]]:
    """The environment to submit a job in, and the names of variables that it omits."""
    dropped = sorted(name for name in os.environ if name.startswith(_OF_JOBS) and not name.startswith(_CONNECTION))
    return {name: value for name, value in os.environ.items() if name not in dropped}, dropped
