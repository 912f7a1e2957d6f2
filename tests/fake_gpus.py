"""Programs on GPUs that do not exist: ``python -m tests.fake_gpus MODULE ARGUMENTS...``.

CUDA_VISIBLE_DEVICES has the numbers of those that the process sees, as Slurm sets it. Once a process has chosen one, it
computes on the CPU.
"""

import os
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

stock_init = dist.init_process_group


def install() -> None:
    """Have torch see them, until one is chosen."""
    numbers = os.environ["CUDA_VISIBLE_DEVICES"].split(",")

    def set_device(index: int) -> None:
        assert index < len(numbers), "CUDA error: invalid device ordinal"
        torch.cuda.is_available = lambda: False

    def init(backend: str) -> Any:
        return stock_init(backend.replace("nccl", "gloo"))

    dist.init_process_group = init
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(numbers)
    torch.cuda.set_device = set_device
    torch.cuda.mem_get_info = lambda index: (100, 100)
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"GPU-{numbers[index]}")


if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
