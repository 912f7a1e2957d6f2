"""`slurm.preflight` on a node with a slow network: its clock reports SLOW_S seconds more for every all-reduce."""

import os
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from slurm import network, preflight

stock_all_reduce = dist.all_reduce
_added_s = 0.0


def all_reduce(*arguments: Any, **options: Any) -> Any:
    """The stock one, after which the clock of `slurm.network` is ahead."""
    global _added_s
    _added_s += float(os.environ["SLOW_S"])
    return stock_all_reduce(*arguments, **options)


if __name__ == "__main__":
    dist.all_reduce = all_reduce
    network.time = SimpleNamespace(perf_counter=lambda: perf_counter() + _added_s)  # type: ignore[assignment]
    preflight.main()
