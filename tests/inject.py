"""The pretraining program with failures at chosen steps: ``python -m tests.inject ARGUMENTS``.

INJECT in the environment is a JSON object:

    {"until_stop": [4, 8]}                 these steps wait until the run is asked to stop; only in a job's first start
    {"until_stop_of_start": [2, 5]}        the same, a step for each start of a job
    {"until_file": [1, "PATH"]}            this step waits until the file is there
    {"nan": [[3, 1], [4, 1]]}              the loss of [step, rank] is NaN
    {"kill": [5, 1]}                       SIGKILL at a step on a rank, unless the file ONCE exists, which it makes
    {"freeze": [5, 1]}                     SIGSTOP in the same way
    {"no_data": [5, 1]}                    the reader hands over nothing more
    {"eval_until_stop": true}              every evaluation batch waits until the run is asked to stop

A step is the number of those done before it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain import train
from unimo3.data.loader import TrainingLoader
from unimo3.distributed import world
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.preempt import StopListener
from unimo3.training.trainer import Trainer

INJECT: dict[str, Any] = json.loads(os.environ.get("INJECT", "{}"))
_step = 0
_requests: list[StopListener] = []


def _is_due(failure: str) -> bool:
    if INJECT.get(failure) != [_step, world()[0]]:
        return False
    once = os.environ.get("ONCE")
    if once:
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)  # between two looks


def _wait_until_stop() -> None:
    """On rank 0, which looks for the files; the other ranks wait for it in their next collective."""
    if world()[0] == 0:
        _wait_until(lambda: _requests[-1].received)


def install(self: StopListener) -> StopListener:
    """The request's own, remembered."""
    _requests.append(self)
    return stock_install(self)


def train_step(self: Trainer, micro_batches: list[dict[str, Any]]) -> None:
    """The trainer's own, after what is to happen at this step."""
    global _step
    _step = step = self.run.step
    num_restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if (num_restarts == 0 and step in INJECT.get("until_stop", [])) or (
        [step] == INJECT.get("until_stop_of_start", [])[num_restarts : num_restarts + 1]
    ):
        _wait_until_stop()
    if INJECT.get("until_file", [None])[0] == step:
        _wait_until(Path(INJECT["until_file"][1]).exists)
    if _is_due("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if _is_due("freeze"):
        os.kill(os.getpid(), signal.SIGSTOP)
    stock_train_step(self, micro_batches)


def forward(self: PretrainingLoss, batch: dict[str, Any]) -> dict[str, Any]:
    """The task's own, but for its loss."""
    report = stock_forward(self, batch)
    if not self.training:
        if "eval_until_stop" in INJECT:
            _wait_until_stop()
    elif [_step, world()[0]] in INJECT.get("nan", []):
        report["loss"] = report["loss"] * float("nan")
    return report


def iterate(self: TrainingLoader) -> Iterator[Any]:
    """The loader's own, until it has nothing more."""
    for number, batches in enumerate(stock_iterate(self)):
        if INJECT.get("no_data") == [number, world()[0]]:
            while True:
                time.sleep(60)  # until the process is ended
        yield batches


stock_train_step, Trainer.train_step = Trainer.train_step, train_step  # type: ignore[method-assign]
stock_install, StopListener.install = StopListener.install, install  # type: ignore[method-assign]
stock_forward, PretrainingLoss.forward = PretrainingLoss.forward, forward  # type: ignore[method-assign]
stock_iterate, TrainingLoader.__iter__ = TrainingLoader.__iter__, iterate  # type: ignore[method-assign]

if __name__ == "__main__":
    train.main(sys.argv[1:])
