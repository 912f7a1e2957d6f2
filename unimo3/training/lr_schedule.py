"""Learning-rate schedules: a linear warm-up, then one of `SCHEDULES`.

A schedule is a function of the step alone and is written into the optimizer before each step, so a resumed run has
nothing to restore for it. To add one, write it into `SCHEDULES`: ``optim.schedule`` takes its name.

Source: METER, arXiv 2111.02387, for the linear one; SGDR, arXiv 1608.03983, for the cosine; MiniCPM, arXiv 2404.06395,
for wsd (warm-up, stable, decay).
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Fraction of the steps after the warm-up that remain, from 1 to 0, and the one at which the decay of wsd begins
# -> factor of the peak rate.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda remaining, decaying: remaining,
    "cosine": lambda remaining, decaying: 0.5 * (1.0 - math.cos(math.pi * remaining)),
    "constant": lambda remaining, decaying: 1.0,
    "wsd": lambda remaining, decaying: min(1.0, remaining / decaying),
}


def lr_scale(
    step: int, num_steps: int, warmup_ratio: float, schedule: str = "linear", decay_ratio: float = 0.1
) -> float:
    """Factor of the peak rate, from 0 to 1.

    Args:
        step: optimizer steps done before this one.
        num_steps: optimizer steps of the complete run.
        warmup_ratio: fraction of them over which the rate rises.
        schedule: what follows, one of `SCHEDULES`.
        decay_ratio: of wsd, the fraction of all steps at the end over which the rate falls to zero.
    """
    num_warmup = int(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    num_after = max(1, num_steps - num_warmup)
    num_decaying = min(num_after, max(1, int(num_steps * decay_ratio)))
    return SCHEDULES[schedule](max(0.0, (num_steps - step) / num_after), num_decaying / num_after)


def set_lr(optimizer: "torch.optim.Optimizer", scale: float) -> None:
    """Set every parameter group's rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
