"""Timed training steps of several models in turns, and the peak memory of one.

Whatever else the machine does then hits all models alike, and comparisons are within one round.

Source: torch's timing advice (warm-up, synchronize, medians); proc(5) for VmHWM.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

PHASES = ("forward", "backward", "optimizer")
NUM_WARM_UP = 2


class Trainee:
    """A model with its optimizer, and what its steps took.

    Computes in float32 on a CPU; on a GPU in bfloat16 by autocast, with weights and optimizer in float32.

    Args:
        module: batch -> loss.

    Attributes:
        seconds: of each step, one number a phase (`PHASES`).
        losses: of each step.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module.to(device)
        self.device = device
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.01)
        self.seconds: list[tuple[float, ...]] = []
        self.losses: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> None:
        """Take one training step.

        Raises:
            FloatingPointError: its loss is not finite; such a step measures nothing.
        """
        batch = {name: value.to(self.device) for name, value in batch.items()}
        loss, forward = self._timed(lambda: self._loss(batch))
        _, backward = self._timed(loss.backward)
        _, update = self._timed(self._update)
        self.losses.append(loss.item())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{type(self.module).__name__}: loss {loss.item()} in step {len(self.losses)}")
        self.seconds.append((forward, backward, update))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        on_gpu = self.device.type == "cuda"
        precision: AbstractContextManager = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
        with precision:
            return self.module(batch)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        self._synchronize()
        start = time.perf_counter()
        result = work()
        self._synchronize()
        return result, time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def time_in_turns(
    turns: Mapping[str, Callable[[], Trainee]],
    batch_of: Callable[[int], dict[str, Tensor]],
    num_rounds: int,
    label: str,
) -> dict[str, list[tuple[float, ...]]]:
    """Take one step of each in every round.

    Args:
        turns: name -> what readies and returns that name's trainee; called before each of its steps, untimed.
        batch_of: round -> the batch on which all step in it.
        num_rounds: rounds to measure, after `NUM_WARM_UP` further ones.
        label: for the progress bar.

    Returns:
        name -> seconds of each measured round's step, one number a phase.
    """
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in turns}
    with tqdm(total=(NUM_WARM_UP + num_rounds) * len(turns), desc=label, unit="step") as bar:
        for number in range(NUM_WARM_UP + num_rounds):
            batch = batch_of(number)
            for name, ready in turns.items():
                trainee = ready()
                trainee.step(batch)
                seconds[name].append(trainee.seconds[-1])
                bar.update()
    return {name: steps[NUM_WARM_UP:] for name, steps in seconds.items()}


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has had: a GPU's allocations, or pages in memory on a CPU.

    ``getrusage`` would not do: its peak includes what the parent had when it forked.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
