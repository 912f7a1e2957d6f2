"""The pretraining program with faults at chosen steps: ``python -m tests.faulty ARGUMENTS``.

FAULTS in the environment is a JSON object:

    {"until_stop": [4, 8]}                 these steps wait until the run is asked to stop; only in a job's first start
    {"until_file": [1, "PATH"]}            this step waits until the file is there
    {"nan": [[3, 1], [4, 1]]}              the loss of [step, rank] is NaN
    {"kill": [5, 1]}                       SIGKILL at a step on a rank, unless the file ONCE exists, which it makes
    {"freeze": [5, 1]}                     SIGSTOP likewise
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
from unimo3.objectives.base import PretrainingTask
from unimo3.training import loop
from unimo3.training.preempt import StopRequest

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
_step = 0
_requests: list[StopRequest] = []


def _is_due(fault: str) -> bool:
    if FAULTS.get(fault) != [_step, world()[0]]:
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


def install(self: StopRequest) -> StopRequest:
    """The request's own, remembered."""
    _requests.append(self)
    return stock_install(self)


def rate_share(step: int, *arguments: Any) -> float:
    """Called by the loop at every step."""
    global _step
    _step = step
    if step in FAULTS.get("until_stop", []) and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        _wait_until(lambda: _requests[-1].received)
    if FAULTS.get("until_file", [None])[0] == step:
        _wait_until(Path(FAULTS["until_file"][1]).exists)
    if _is_due("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if _is_due("freeze"):
        os.kill(os.getpid(), signal.SIGSTOP)
    share: float = stock_rate_share(step, *arguments)
    return share


def forward(self: PretrainingTask, batch: dict[str, Any]) -> dict[str, Any]:
    """The task's own, but for its loss."""
    report = stock_forward(self, batch)
    if not self.training:
        if "eval_until_stop" in FAULTS:
            _wait_until(lambda: _requests[-1].received)
    elif [_step, world()[0]] in FAULTS.get("nan", []):
        report["loss"] = report["loss"] * float("nan")
    return report


def iterate(self: TrainingLoader) -> Iterator[Any]:
    """The loader's own, until it has nothing more."""
    for number, batches in enumerate(stock_iterate(self)):
        if FAULTS.get("no_data") == [number, world()[0]]:
            while True:
                time.sleep(60)  # until the process is ended
        yield batches


stock_rate_share, loop.rate_share = loop.rate_share, rate_share
stock_install, StopRequest.install = StopRequest.install, install  # type: ignore[method-assign]
stock_forward, PretrainingTask.forward = PretrainingTask.forward, forward  # type: ignore[method-assign]
stock_iterate, TrainingLoader.__iter__ = TrainingLoader.__iter__, iterate  # type: ignore[method-assign]

if __name__ == "__main__":
    train.main(sys.argv[1:])
