"""Ranks forked from a process that has everything imported, so that many short trials are cheap.

For programs of their own, not for the test process: a fork must not inherit its threads.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (before the forks)
import torch

from unimo3 import distributed
from unimo3.launch import free_port

_TIMEOUT_S = 60.0


def in_ranks(folder: Path, work: Callable[[int], Any], size: int = 2) -> list[Any]:
    """Call `work` in forked ranks; what each returned, ``"killed"``, or ``"failed: ..."``.

    When one ends without a result the others are killed, as a launcher does.
    """
    port = free_port()
    results = [folder / f"result_{rank}.json" for rank in range(size)]
    children = []
    for rank in range(size):
        results[rank].unlink(missing_ok=True)
        if not (child := os.fork()):
            _be_rank(rank, size, port, work, results[rank])
        children.append(child)
    told: list[Any] = [None] * size
    deadline = time.monotonic() + _TIMEOUT_S
    while None in told:
        for rank, child in enumerate(children):
            if told[rank] is None and (status := os.waitpid(child, os.WNOHANG))[0]:
                ended_well = os.waitstatus_to_exitcode(status[1]) == 0
                told[rank] = json.loads(results[rank].read_text()) if ended_well else "killed"
        hangs = time.monotonic() > deadline
        if hangs or ("killed" in told and None in told):
            for rank, child in enumerate(children):
                if told[rank] is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    told[rank] = "failed: it hung" if hangs else "killed"
        time.sleep(0.005)
    return told


def _be_rank(rank: int, size: int, port: int, work: Callable[[int], Any], result: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        torch.set_num_threads(1)
        distributed.init()
        told = work(rank)
    except BaseException:
        told = f"failed: {traceback.format_exc(limit=-1)}"
    result.write_text(json.dumps(told))
    os._exit(0)
