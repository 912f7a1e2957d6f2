"""A job of hundreds of nodes on one host: the checks of a node, and what the job script decides from their files.

A node's check and each decision run as the job script starts them. The files of all other nodes and ranks have the form
that the programs write. `srun` itself is not measured.

Source: slurm/common.sh for the commands.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.file_operations import operations, strace_command
from benchmarks.report import ROOT
from unimo3.training.heartbeat import HEARTBEATS, Heartbeat

RANKS_PER_NODE = 8
_ROUNDS = 3


@dataclass(frozen=True)
class Decision:
    """One program of the job.

    Attributes:
        seconds: median, the start of Python included.
        operations: on the run's folder, see `file_operations.py`.
        answer: the last line that it printed.
    """

    seconds: float
    operations: int
    answer: str


def measure_job(num_nodes: int, work: Path) -> dict[str, Decision]:
    """Check a node and decide for all, with a good end and with one rank that failed.

    Raises:
        ConfigError: there is no strace.
        RuntimeError: a program failed.
    """
    run = work / "run"
    nodes = [f"node{number:04d}" for number in range(num_nodes)]
    results, statuses = run / "slurm" / "preflight.1.0", run / "slurm" / "statuses"
    for folder in (results, statuses, run / HEARTBEATS):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text("training: {steps: 100}\n")
    check = ("slurm.preflight", "node", "--run", run, "--results", results, "--local-disk", work)
    policy = ("slurm.requeue_policy", "--run", run)
    done = {"a node: checks of pre-flight": _run(check, run, work, node=nodes[0])}
    good = (results / f"{nodes[0]}.json").read_text()
    for node in nodes:
        (results / f"{node}.json").write_text(good)
    decide = ("preflight", "--results", results, "--nodes", " ".join(nodes))
    done["pre-flight, all nodes good"] = _run((policy[0], decide[0], *policy[1:], *decide[1:]), run, work)
    (results / f"{nodes[-1]}.json").write_text(json.dumps({"problems": ["no GPU answers"], "job": []}))
    done["pre-flight, one bad node"] = _run((policy[0], decide[0], *policy[1:], *decide[1:]), run, work)
    num_ranks = num_nodes * RANKS_PER_NODE
    end = (policy[0], "end", *policy[1:], "--statuses", statuses)
    for rank in range(num_ranks):
        (statuses / f"end_{rank}").write_text("0\n")
        (statuses / f"rank_{rank}").write_text("0\n\n")
    done["end, all ranks with status 0"] = _run((*end, "--status", 0), run, work)
    for rank in range(num_ranks):
        (statuses / f"end_{rank}").write_text("137\n")
    (statuses / f"rank_{num_ranks - 1}").write_text("71\nno progress for 900 s\n")
    done["end, one rank with status 71"] = _run((*end, "--status", 137), run, work)
    now = time.time()
    for rank in range(num_ranks):
        beat = Heartbeat(rank, nodes[rank // RANKS_PER_NODE], 100 + rank, 5, "compute", 20, now, now)
        (run / HEARTBEATS / f"rank_{rank:05d}.json").write_text(json.dumps(asdict(beat)) + "\n")
    done["`slurm.status RUN`"] = _run(("slurm.status", run), run, work)
    return done


def job_table(num_nodes: int, done: dict[str, Decision]) -> str:
    """In markdown, a row a program."""
    return "\n".join(
        [
            "| program | s | operations | answer |",
            "| --- | ---: | ---: | --- |",
            *(f"| {name} | {one.seconds:.2f} | {one.operations} | {one.answer[:60]} |" for name, one in done.items()),
            "",
            f"{num_nodes} nodes with {RANKS_PER_NODE} ranks each. The check of a node and the decisions run as the job",
            "script starts them, the files of the other nodes and ranks are written by this benchmark. Operations are",
            "calls on the run's folder. Seconds are medians with the start of Python; srun is not included.",
        ]
    )


def _run(words: Sequence[object], run: Path, work: Path, node: str = "") -> Decision:
    command = [sys.executable, "-m", *map(str, words)]
    environment = os.environ | {"JOB": "1", "SLURM_JOB_ID": "1", "BAD_NODES": str(work / "bad_nodes.jsonl")}
    environment |= {"SLURMD_NODENAME": node} if node else {}
    seconds = []
    # The last time under strace, for the count alone.
    trace = work / "trace.txt"
    for words_before in (*[[]] * _ROUNDS, strace_command(trace)):
        started = time.perf_counter()
        ended = subprocess.run([*words_before, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command[:5])} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    lines = ended.stdout.strip().splitlines()
    answer = next((line.removeprefix("answer: ") for line in reversed(lines) if line.startswith("answer:")), "")
    return Decision(median(seconds[:_ROUNDS]), len(operations(trace, run)), answer.strip())
