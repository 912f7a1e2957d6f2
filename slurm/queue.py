"""What Slurm says of a job.

Source: squeue(1).
"""

import subprocess

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
