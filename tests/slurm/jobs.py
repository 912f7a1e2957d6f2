"""Training jobs of the project's own scripts on a cluster, with failures; and what became of their runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from slurm import history
from tests.slurm.cluster import Cluster
from tests.waiting import wait_for
from unimo3.training.metrics import read_metrics

NUM_STEPS = 8
CLIENT = Path(__file__).with_name("fork_client.py")
# Modules that import torch and are started often; most others of a job start in a tenth of a second.
FORKED = "tests.inject tests.slurm.join tests.slow_network tests.fake_gpus slurm.preflight"
_FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "SPECIAL_EXIT",
    "TIMEOUT",
}


class Jobs:
    """Submits training jobs on the cluster and watches their runs.

    Args:
        server: the socket of `tests.slurm.fork_server`, which ranks are forked from; with FRESH in its environment, a
            job starts interpreters instead.
    """

    def __init__(self, cluster: Cluster, recipe: Path, folder: Path, server: Path):
        self.cluster, self.recipe, self.folder = cluster, recipe, folder
        self.runs = recipe.parent / "runs"
        self.site = folder / "site.env"
        self.site.write_text(f"RANKS_PER_NODE=1\nLOCAL_DISK={folder}/local\nSLURM_RETRY_S=2\n")
        # Where a site names its Python; this one trains with the failures that the environment names.
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/bash\n[[ "$*" != "-m pretrain.train "* ]] || set -- -m tests.inject "${{@:3}}"\n'
            f'[[ -n ${{FRESH:-}} || " {FORKED} " != *" $2 "* ]] || exec {sys.executable} -IS {CLIENT} {server} "$@"\n'
            f'exec {sys.executable} "$@"\n'
        )
        self.python.chmod(0o755)
        self.environment = {
            "UNIMO3_SITE": str(self.site),
            "UNIMO3_PYTHON": str(self.python),
            "OMP_NUM_THREADS": "1",
            "BAD_NODES": str(folder / "bad_nodes.jsonl"),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def submit(
        self,
        name: str,
        *arguments: object,
        options: tuple[str, ...] = (),
        inject: dict[str, Any] | None = None,
        **environment: str,
    ) -> int:
        """Submit a pretraining of `NUM_STEPS` steps as run `name`, by default without pre-flight; the job's number."""
        command = [
            "sbatch",
            "--parsable",
            "--time=120",
            *options,
            f"--output={self.folder}/%j.log",
            "slurm/pretrain.sbatch",
            "--config",
            self.recipe,
            "--run.name",
            name,
            "--training.steps",
            NUM_STEPS,
            "--checkpoint.every_steps",
            4,
            *arguments,
        ]
        return self.sbatch(*command, **{"PREFLIGHT": "no", "INJECT": json.dumps(inject or {}), **environment})

    def sbatch(self, *command: object, **environment: str) -> int:
        """Submit; the job's number."""
        before = dict(self.cluster.environment)
        self.cluster.environment |= self.environment | environment
        try:
            return int(self.cluster.call(*command, cwd=ROOT).strip().split(";")[0])
        finally:
            self.cluster.environment = before

    def preempt(self) -> int:
        """Submit a job of a higher partition that takes the first two nodes; its number."""
        command = ("sbatch", "--parsable", "--partition=high", "--nodes=2", "--nodelist=n1,n2", "--exclusive")
        return self.sbatch(*command, "--output=/dev/null", "--wrap", "true")

    def log(self, job: int) -> str:
        """What a job has written."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def state(self, job: int) -> str:
        """A job's state, such as ``COMPLETED``."""
        return self.cluster.job(job)["JobState"]

    def wait_state(self, job: int, *states: str) -> None:
        """Wait until a job is in one of some states; another final one is an error."""
        self._wait(job, lambda: self.state(job) in states, f"job {job} in {states}")

    def wait_ended(self, job: int) -> None:
        """Wait until nothing of a job runs any more."""
        self.cluster.wait(lambda: "EndTime" in self.cluster.job(job) and not self._is_active(job), f"end of {job}")

    def wait_step(self, job: int, name: str, step: int) -> None:
        """Wait until a run has done so many steps."""
        self._wait(job, lambda: len(self.steps(name)) >= step, f"step {step} of {name}")

    def _is_active(self, job: int) -> bool:
        listed = self.cluster.call("squeue", "--noheader", f"--jobs={job}", "--format=%T", check=False)
        return bool(listed.strip())

    def steps(self, name: str) -> list[dict[str, Any]]:
        """A run's training steps."""
        return read_metrics(self.runs / name)

    def attempts(self, name: str, number: int | None = None) -> list[history.Attempt]:
        """A run's starts; it is an error if there are not `number` of them."""
        attempts = history.read(self.runs / name)
        assert number in (None, len(attempts)), "\n".join(map(str, attempts))
        return attempts

    def _wait(self, job: int, condition: Callable[[], object], what: str) -> None:
        def is_over() -> bool:
            return self.state(job) in _FINAL_STATES

        def output() -> str:
            return f"{self.cluster.job(job)}\n{self.log(job)[-3500:]}"

        wait_for(lambda: condition() or is_over(), what, output, poll_s=0.2)
        assert condition(), f"the job ended before {what}:\n{output()}"
