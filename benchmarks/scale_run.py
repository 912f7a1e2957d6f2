"""What two ranks of a training run ask of the server of its folder, with the intervals of a thousand.

The run is that of the tiny recipe on drawn data, ended by RUN/stop. Each rank runs under strace.

Source: none.
"""

import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.file_operations import Operation, operations, per_minute, strace_command
from benchmarks.report import ROOT
from unimo3.launch import start_ranks, wait_for_ranks
from unimo3.training.metrics import read_metrics

TARGET = 4.0
_START_S = 900.0


@dataclass(frozen=True)
class RankOperations:
    """Operations of one rank on the run's folder.

    Attributes:
        start: before the first step is logged.
        each_minute: while the run trains, by call and file.
        end: after the run is asked to stop, with its only save.
    """

    start: int
    each_minute: Counter[str]
    end: int

    @property
    def rate(self) -> float:
        """Operations a minute while the run trains."""
        return sum(self.each_minute.values())


@dataclass(frozen=True)
class RunOperations:
    """Both ranks.

    Attributes:
        minutes: that were counted, with `num_steps` steps.
    """

    ranks: list[RankOperations]
    minutes: float
    num_steps: int

    def mean_rate(self, num_ranks: int) -> float:
        """Operations a rank and minute of a run whose other ranks do what rank 1 does."""
        return (self.ranks[0].rate + (num_ranks - 1) * self.ranks[1].rate) / num_ranks


def measure_run(num_ranks: int, minutes: float, work: Path) -> RunOperations:
    """Train for some minutes after the first step.

    Raises:
        ConfigError: there is no strace.
        RuntimeError: the run failed.
    """
    traces = [work / f"rank_{rank}.txt" for rank in range(2)]
    before = strace_command(Path("TRACE"))
    run, recipe = work / "runs" / "tiny", _prepare(work)
    command = [sys.executable, "-m", "benchmarks.scale_rank", str(num_ranks), *recipe]
    # Each rank has another trace.
    script = 'trace=$0_$RANK.txt; exec "${@/#TRACE/$trace}"'
    log = work / "log.txt"
    with log.open("w") as file:
        shell = ["bash", "-c", script, str(work / "rank"), *before, *command]
        ranks = start_ranks(2, shell, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            began = _wait_for_steps(run, 2, ranks, log)
            while time.time() < began + 60 * minutes and all(rank.poll() is None for rank in ranks):
                time.sleep(1.0)  # between two looks at the clock
            asked, num_steps = time.time(), len(read_metrics(run)) - 2
        finally:
            (run / "stop").touch()
            status = wait_for_ranks(ranks, grace_s=5, timeout_s=600)
    if status:
        raise RuntimeError(f"the run ended with {status}:\n{log.read_text()[-3000:]}")
    counted = [_of_rank(operations(trace, run), began, asked) for trace in traces]
    return RunOperations(counted, (asked - began) / 60, num_steps)


def run_table(num_ranks: int, measured: RunOperations) -> str:
    """In markdown, and the mean over all ranks."""
    first, other = measured.ranks
    names = sorted({*first.each_minute, *other.each_minute}, key=lambda name: -first.each_minute[name])
    mean = measured.mean_rate(num_ranks)
    per_step = sum(count for name, count in first.each_minute.items() if "metrics" in name or "events" in name)
    lines = [
        "| operation | rank 0 | rank 1 |",
        "| --- | ---: | ---: |",
        f"| up to the first steps, all | {first.start} | {other.start} |",
        f"| **a minute of training, all** | {first.rate:.1f} | {other.rate:.1f} |",
        *(f"| {name} | {first.each_minute[name]:.1f} | {other.each_minute[name]:.1f} |" for name in names),
        f"| after `RUN/stop`, with a save, all | {first.end} | {other.end} |",
        "",
        f"Two ranks trained the tiny recipe for {measured.minutes:.1f} minutes and {measured.num_steps} steps. Their",
        f"watch had the intervals of {num_ranks} ranks. Each ran under strace, which counts calls that name a path in",
        "the run's folder, and reads, writes, flushes, locks and closes of its files.",
        "",
        f"At {num_ranks} ranks: ({first.rate:.1f} + {num_ranks - 1} x {other.rate:.1f}) / {num_ranks} = **{mean:.2f}",
        f"operations a rank and minute**. Target: at most {TARGET:g}. Every other rank does what rank 1 does. Of rank",
        f"0's, {per_step:.1f} a minute belong to metrics, and grow with the steps a minute. They count once, however",
        "many ranks there are.",
    ]
    return "\n".join(lines)


def _prepare(work: Path) -> list[str]:
    """Shards of drawn data; the arguments of the run."""
    coco = work / "coco"
    for command in (
        ["pretrain.toy", work / "toy", "--images", 200, "--size", 64],
        ["pretrain.prepare_shards", "coco", "--src", work / "toy" / "coco", "--out", coco, "--tokenizer-vocab", 512],
    ):
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    settings = {
        "run.dir": work / "runs",
        "data.train": coco / "train",
        "data.tokenizer": coco / "tokenizer",
        "data.max_epochs": 100_000,
        "training.steps": 100_000,
        "checkpoint.every_steps": 100_000,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["--config", "pretrain/recipes/tiny.yaml", *words]


def _wait_for_steps(run: Path, number: int, ranks: list[subprocess.Popen], log: Path) -> float:
    """When a step of that number was seen in the metrics, seconds since 1970."""
    ends = time.monotonic() + _START_S
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < number:
        if time.monotonic() > ends or any(rank.poll() is not None for rank in ranks):
            raise RuntimeError(f"no step {number} of the run:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)  # between two looks
    return time.time()


def _of_rank(done: list[Operation], began: float, asked: float) -> RankOperations:
    start, end = (sum(test(one.at_s) for one in done) for test in (began.__gt__, asked.__le__))
    return RankOperations(start, per_minute(done, began, asked), end)
