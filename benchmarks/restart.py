"""Seconds from what interrupts a job to its next training step, on a Slurm of two nodes on this host.

For each event a run of the tiny recipe of the tests is interrupted in its middle. Measured are the time until its
checkpoint is committed (of those that save), until the job runs again, and until its first step after that. What Slurm
itself waits for, such as the detection of a lost node, is in these times and is told by the clock of its own log.

Source: none.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, write_report
from slurm.runs import newest_step
from tests.integration.conftest import DS_CONFIG, MODEL
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs

AT_STEP = 5
TWO = ("--nodes=2", "--exclude=n3")
PREEMPT = (
    "sbatch",
    "--parsable",
    "--partition=high",
    "--nodes=3",
    "--exclusive",
    "--output=/dev/null",
    "--wrap",
    "true",
)


def come_to_the_time_limit(jobs: Jobs, job: int, run: str) -> None:
    """Wait for the signal that Slurm sends before it; the first rank that hears it makes this file."""
    jobs.cluster.wait(
        lambda: (jobs.runs / run / "requeue").exists() or "asked to stop" in jobs.log(job), 180, "Slurm's signal"
    )


@dataclass(frozen=True)
class Event:
    """What interrupts a job.

    Attributes:
        strike: does it, given the jobs, the job's number and the run's name.
        faults: of the program, if it is the program itself that fails.
        saves: whether the run saves before it ends.
    """

    name: str
    strike: Callable[[Jobs, int, str], object] | None
    options: tuple[str, ...] = TWO
    faults: tuple[tuple[str, object], ...] = ()
    arguments: tuple[object, ...] = ()
    saves: bool = True


EVENTS = (
    Event("scancel --signal=USR1", lambda jobs, job, run: jobs.cluster.call("scancel", "--signal=USR1", job)),
    Event("touch RUN/requeue", lambda jobs, job, run: (jobs.runs / run / "requeue").touch()),
    Event("scontrol requeue", lambda jobs, job, run: jobs.cluster.call("scontrol", "requeue", job)),
    Event("preemption by a higher partition", lambda jobs, job, run: jobs.sbatch(*PREEMPT), (*TWO, "--exclusive")),
    Event(
        "time limit, steps of 5 s", come_to_the_time_limit, (*TWO, "--time=3", "--signal=USR2@60"),
        faults=(("slow", 5.0),), arguments=("--training.steps", 24),
    ),
    Event("a rank killed", None, faults=(("kill", [AT_STEP, 1]),), saves=False),
    Event(
        "a rank frozen, stall_after_s 5", None, faults=(("freeze", [AT_STEP, 1]),),
        arguments=("--training.stall_after_s", 5), saves=False,
    ),
    Event(
        "a node lost", lambda jobs, job, run: jobs.cluster.kill_node("n2"), ("--nodes=1-2", "--exclude=n3"), saves=False
    ),
)  # fmt: skip


def measure(jobs: Jobs, event: Event, number: int) -> tuple[float, float | None, float]:
    """Interrupt a run.

    Returns:
        Seconds from the event to the commit (None: it does not save) and to the end of the next step; and what a first
        start of the same job took up to its first step.
    """
    name, once = f"run_{number}", jobs.folder / f"once_{number}"
    submitted = time.time()
    job = jobs.submit(
        name, *event.arguments, options=event.options, faults={"slow": 0.5, **dict(event.faults)},
        ONCE=str(once), PREFLIGHT="yes",
    )  # fmt: skip
    jobs.wait_step(job, name, 1)
    first = time.time() - submitted
    if event.strike is not None:
        jobs.wait_step(job, name, AT_STEP)
        event.strike(jobs, job, name)
    else:
        jobs.cluster.wait(once.exists, 120, "the fault")
    struck = time.time()
    committed: float | None = None
    seen = newest_step(jobs.runs / name)
    done = jobs.steps(name)[-1]["step"]
    while True:
        if event.saves and committed is None and newest_step(jobs.runs / name) != seen:
            committed = time.time() - struck
        attempts = jobs.attempts(name)
        steps = jobs.steps(name)
        # A start after the first, and a step that is not of before it.
        if len(attempts) > 1 and attempts[-1].time > struck:
            began = attempts[-1].checkpoint or 0
            if (
                steps
                and steps[-1]["step"] > began
                and (jobs.runs / name / "metrics.jsonl").stat().st_mtime > attempts[-1].time
            ):
                break
        if time.time() - struck > 240:
            raise RuntimeError(f"{event.name}: no further step after step {done}:\n{jobs.log(job)[-3000:]}")
        time.sleep(0.05)
    resumed = time.time() - struck
    jobs.wait_state(job, "COMPLETED", timeout_s=240)
    return first, committed, resumed


def prepare(folder: Path) -> Path:
    """Shards of drawn data and a small recipe on them."""
    for command in (
        ["pretrain.toy", str(folder / "toy"), "--images", "60", "--size", "32"],
        ["pretrain.prepare_shards", "coco", "--src", str(folder / "toy" / "coco"), "--out", str(folder / "coco"),
         "--tokenizer-vocab", "300"],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    (folder / "bf16.json").write_text(DS_CONFIG % "true")
    coco = folder / "coco"
    recipe = {
        "run": {"dir": str(folder / "runs")}, "model": MODEL,
        "data": {"train": str(coco / "train"), "tokenizer": str(coco / "tokenizer"), "max_text_tokens": 16,
                 "num_workers": 1},
        "training": {"global_batch": 8, "micro_batch": 4, "ds_config": str(folder / "bf16.json")},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def report(rows: list[tuple[str, float, float | None, float]]) -> str:
    """The result in markdown."""
    lines = [
        "| event | committed, s | next step, s | first start, s |", "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {'-' if committed is None else f'{committed:.1f}'} | {resumed:.1f} | {first:.1f} |"
            for name, first, committed, resumed in rows
        ),
        "",
        "Committed: from the event to a committed checkpoint, where the run saves; a step takes 0.6 s if nothing else",
        "is said, and a file is seen within a second. Next step: from the event to the end of the first step after it,",
        "with pre-flight and the start of Python for two nodes on two cores; for comparison from submission to the",
        "very first step. Slurm detects a lost node after SlurmdTimeout, here 10 s, and starts a requeued job after",
        "some seconds.",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(prog="python benchmarks/restart.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "restart.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        recipe = prepare(folder)
        cluster = Cluster(folder / "slurm")
        cluster.start()
        try:
            (folder / "jobs").mkdir()
            jobs = Jobs(cluster, recipe, folder / "jobs")
            rows = []
            for number, event in enumerate(EVENTS):
                rows.append((event.name, *measure(jobs, event, number)))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            cluster.stop()
    text = report(rows)
    write_report(args.out, "Seconds from an interruption to the next step", text)
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
