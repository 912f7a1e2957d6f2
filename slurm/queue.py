"""What Slurm says of a job.

Source: squeue(1).
"""

import subprocess
import time

# A job that has or may again have the run's folder to itself.
ACTIVE = ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED")
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED")


def ask(job: str, form: str = "%T") -> str:
    """A job's first line in squeue's `form`, its state by default; empty if Slurm has forgotten it or is not here."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", f"--format={form}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.strip().split("\n")[0]


def is_at_work(job: str, num_tries: int = 20, wait_s: float = 15.0) -> bool:
    """Whether a job's processes may be there; a controller that is away, as when it fails over, is waited for.

    One that stays away might still have it: then it is taken to be at work.
    """
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    for number in range(num_tries):
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            return False  # no Slurm here
        except subprocess.TimeoutExpired:
            continue
        if told.returncode == 0:
            return told.stdout.strip().split("\n")[0] in AT_WORK
        if "Invalid job id" in told.stderr:
            return False  # forgotten
        if number + 1 < num_tries:
            time.sleep(wait_s)
    return True
