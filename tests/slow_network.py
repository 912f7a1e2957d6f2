"""`slurm.preflight` on a node whose network is slow: every all-reduce takes SLOW_S seconds more."""

import os
import time
from typing import Any

import torch.distributed as dist

from slurm import preflight

stock_all_reduce = dist.all_reduce


def all_reduce(*arguments: Any, **options: Any) -> Any:
    """The stock one, later."""
    time.sleep(float(os.environ["SLOW_S"]))
    return stock_all_reduce(*arguments, **options)


if __name__ == "__main__":
    dist.all_reduce = all_reduce
    preflight.main()
