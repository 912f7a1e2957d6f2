"""The learning-rate schedule: linear warm-up, then linear decay to zero.

The schedule is a function of the step alone and is written into the optimizer before each step, so a resumed run has
nothing to restore for it.

Source: METER, arXiv 2111.02387.
"""

import torch


def lr_scale(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Factor of the peak rate, from 0 to 1.

    Args:
        step: optimizer steps done before this one.
        num_steps: optimizer steps of the complete run.
        warmup_ratio: fraction of them over which the rate rises.
    """
    num_warmup = int(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup))


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set every parameter group's rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
