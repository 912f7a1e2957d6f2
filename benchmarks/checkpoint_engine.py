"""An engine of a chosen size, and programs that are one of its ranks and write what they measured.

Source: DeepSpeed 0.19 for the engine; ZeRO-3 in bf16 with AdamW, nothing persistent.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from unimo3.launch import start_ranks, wait_for_ranks

WIDTH = 2048


def num_layers(num_parameters: int) -> int:
    """Square layers that have about that many parameters."""
    return max(1, num_parameters // (WIDTH * WIDTH))


def start_engine(num_parameters: int, universal: bool = False) -> Any:
    """An engine over square layers of about that many parameters.

    Args:
        universal: whether it loads what DeepSpeed's ds_to_universal made.
    """
    import deepspeed
    import torch

    from unimo3 import distributed

    world = distributed.init()
    config = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers(num_parameters))))
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]


def memory_bytes(name: str) -> int:
    """This process's memory: ``VmRSS``, resident now, or ``VmHWM``, its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


def in_ranks(num_ranks: int, module: str, *arguments: object) -> dict[str, Any]:
    """Start a module once a rank; what rank 0 wrote into the file that is its last argument.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result, output = Path(scratch) / "result.json", Path(scratch) / "output.txt"
        command = [sys.executable, "-m", module, *map(str, arguments), str(result)]
        with output.open("w") as file:
            ranks = start_ranks(num_ranks, command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            if status := wait_for_ranks(ranks, grace_s=5):
                raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{output.read_text()[-3000:]}")
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured
