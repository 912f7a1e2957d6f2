"""Seconds from what interrupts a job to its next training step, on a Slurm of two nodes on this host.

For each event a run of the tiny recipe of the tests is interrupted in its middle. Measured are the time until its
checkpoint is committed (of those that save), until the job runs again, and until its first step after that. What Slurm
itself waits for, such as the detection of a lost node, is in these times and is read from its log.

Source: none.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.report import ROOT, write_report
from tests.integration.conftest import DS_CONFIG, MODEL
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs
from unimo3.checkpoint.store import list_checkpoints

AT_STEP = 5
TWO = ("--nodes=2", "--exclude=n3")


def come_to_the_time_limit(jobs: Jobs, job: int, run: str) -> float | None:
    """Wait for the signal that Slurm sends before it, and return when it was sent."""
    jobs.cluster.wait(lambda: jobs.cluster.signalled(job, signal.SIGUSR2), 180, "Slurm's signal")
    return jobs.cluster.signalled(job, signal.SIGUSR2)


@dataclass(frozen=True)
class Event:
    """What interrupts a job.

    Attributes:
        strike: interrupts it, from the jobs, the job's number and the run's name; returns when, if not at the call.
        errors: of the program, if the program itself fails.
        saves: whether the run saves before it ends.
        is_requeued: whether Slurm has it again.
    """

    name: str
    strike: Callable[[Jobs, int, str], float | None] | None
    options: tuple[str, ...] = TWO
    errors: tuple[tuple[str, object], ...] = ()
    arguments: tuple[object, ...] = ()
    saves: bool = True
    is_requeued: bool = True


def call(*words: str) -> Callable[[Jobs, int, str], None]:
    """One of Slurm's commands, with the job as its last word."""

    def strike(jobs: Jobs, job: int, run: str) -> None:
        jobs.cluster.call(*words, job)

    return strike


def preempt(jobs: Jobs, job: int, run: str) -> None:
    """Submit a job that takes the nodes."""
    jobs.preempt()


EVENTS = (
    Event("scancel --signal=USR1", call("scancel", "--signal=USR1")),
    Event("touch RUN/requeue", lambda jobs, job, run: (jobs.runs / run / "requeue").touch()),
    Event("scontrol requeue", call("scontrol", "requeue")),
    Event("scancel", call("scancel"), is_requeued=False),
    Event("preemption by a higher partition", preempt, (*TWO, "--exclusive")),
    Event(
        "time limit, steps of 5 s",
        come_to_the_time_limit,
        (*TWO, "--time=3", "--signal=USR2@60"),
        errors=(("slow", 5.0),),
        arguments=("--training.steps", 24),
    ),
    Event("a rank killed", None, errors=(("kill", [AT_STEP, 1]),), saves=False),
    Event(
        "a rank frozen, stall_after_s 5",
        None,
        errors=(("freeze", [AT_STEP, 1]),),
        arguments=("--training.stall_after_s", 5),
        saves=False,
    ),
    Event(
        "a node lost", lambda jobs, job, run: jobs.cluster.kill_node("n2"), ("--nodes=1-2", "--exclude=n3"), saves=False
    ),
)


def measure(jobs: Jobs, event: Event, number: int) -> tuple[float, float | None, float | None]:
    """Interrupt a run.

    Returns:
        What a first start of the same job took up to its first step; seconds from the event to the commit (None: it
        does not save) and to the end of the next step (None: there is none).
    """
    name, once = f"run_{number}", jobs.folder / f"once_{number}"
    run = jobs.runs / name
    submitted = time.time()
    job = jobs.submit(
        name,
        *event.arguments,
        options=event.options,
        errors={"slow": 0.5, **dict(event.errors)},
        ONCE=str(once),
        PREFLIGHT="yes",
    )
    jobs.wait_step(job, name, 1)
    first = time.time() - submitted
    if event.strike is not None:
        jobs.wait_step(job, name, AT_STEP)
    struck = time.time()
    if event.strike is not None:
        struck = event.strike(jobs, job, name) or struck
    else:
        jobs.cluster.wait(once.exists, 120, "the error")
        struck = once.stat().st_mtime
    committed, resumed = None, None
    while (event.saves and committed is None) or (event.is_requeued and resumed is None):
        if event.saves and committed is None and (at := committed_at(run)) >= struck:
            committed = at - struck
        if event.is_requeued and has_resumed(jobs, name, struck):
            resumed = time.time() - struck
        if time.time() - struck > 240:
            raise RuntimeError(f"{event.name}: no checkpoint, or no step, after it:\n{jobs.log(job)[-3000:]}")
        time.sleep(0.05)
    if event.is_requeued:
        jobs.wait_state(job, "COMPLETED", timeout_s=240)
    else:
        jobs.wait_ended(job)
    return first, committed, resumed


def committed_at(run: Path) -> float:
    """When the newest checkpoint was given its name, seconds since 1970; 0 if there is none."""
    newest = list_checkpoints(run)[-1:]
    return newest[0].stat().st_ctime if newest else 0.0


def has_resumed(jobs: Jobs, name: str, struck: float) -> bool:
    """Whether a run has a start after an event, and a step that is not of before it."""
    attempts, steps = jobs.attempts(name), jobs.steps(name)
    if len(attempts) < 2 or attempts[-1].time < struck or not steps:
        return False
    is_new = (jobs.runs / name / "metrics.jsonl").stat().st_mtime > attempts[-1].time
    return is_new and steps[-1]["step"] > (attempts[-1].checkpoint or 0)


def prepare(folder: Path) -> Path:
    """Shards of drawn data and a small recipe on them."""
    for command in (
        ["pretrain.toy", str(folder / "toy"), "--images", "60", "--size", "32"],
        [
            "pretrain.prepare_shards",
            "coco",
            "--src",
            str(folder / "toy" / "coco"),
            "--out",
            str(folder / "coco"),
            "--tokenizer-vocab",
            "300",
        ],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    (folder / "bf16.json").write_text(DS_CONFIG % "true")
    coco = folder / "coco"
    recipe = {
        "run": {"dir": str(folder / "runs")},
        "model": MODEL,
        "data": {
            "train": str(coco / "train"),
            "tokenizer": str(coco / "tokenizer"),
            "max_text_tokens": 16,
            "num_workers": 1,
        },
        "training": {"global_batch": 8, "micro_batch": 4, "ds_config": str(folder / "bf16.json")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def seconds(value: float | None) -> str:
    """A cell of the table."""
    return "-" if value is None else f"{value:.1f}"


def report(rows: list[tuple[str, float, float | None, float | None]]) -> str:
    """The result in markdown."""
    lines = [
        "| event | committed, s | next step, s | first start, s |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {seconds(committed)} | {seconds(resumed)} | {seconds(first)} |"
            for name, first, committed, resumed in rows
        ),
        "",
        "Committed: from the event to a committed checkpoint, where the run saves; a step takes 0.6 s unless the",
        "event names another time, and a file is seen within a second. Next step: from the event to the end of the",
        "first step after it, with pre-flight and the start of Python for two nodes on two cores; first start: from",
        "submission to the very first step. Slurm detects a lost node after SlurmdTimeout, here 10 s, and starts a",
        "requeued job after some seconds.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "restart.md")
    names = [event.name for event in EVENTS]
    parser.add_argument("--event", choices=names, help="measure this one alone, and write no result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        recipe = prepare(folder)
        cluster = Cluster(folder / "slurm", slurmd_timeout_s=10, cred_expire_s=5)
        cluster.start()
        try:
            (folder / "jobs").mkdir()
            jobs = Jobs(cluster, recipe, folder / "jobs")
            rows = []
            for number, event in enumerate(event for event in EVENTS if args.event in (None, event.name)):
                rows.append((event.name, *measure(jobs, event, number)))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            cluster.stop()
    text = report(rows)
    if args.event:
        print(f"\n{text}")
        return
    write_report(args.out, "Seconds from an interruption to the next step", text)
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
