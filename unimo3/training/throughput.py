"""How much of its GPUs a run uses: operations a second, and model FLOPs utilization.

Source: PaLM, arXiv 2204.02311, appendix B, which leaves out what activation checkpointing computes again; NVIDIA's data
sheets for the peaks, without sparsity.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from unimo3.distributed import World

if TYPE_CHECKING:
    from unimo3.training.plan.step_trace import Step

log = logging.getLogger(__name__)

# In fp16 and bf16, by a part of the name that the driver gives; the first that matches counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,  # and GH200
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


class Throughput(NamedTuple):
    """What turns samples a second into operations a second.

    Attributes:
        flops_per_sample: operations of a forward and a backward pass.
        peak_flops: of one GPU, a second; None: unknown.
    """

    flops_per_sample: float
    num_gpus: int
    peak_flops: float | None

    def metrics(self, samples_per_s: float) -> dict[str, float]:
        """``tflops`` of one GPU, and ``mfu``, the fraction of its peak, where that is known."""
        reached = samples_per_s * self.flops_per_sample / self.num_gpus
        return {"tflops": reached / 1e12} | ({"mfu": reached / self.peak_flops} if self.peak_flops else {})


def peak_flops(gpu: str) -> float | None:
    """Operations a second in fp16 and bf16 of a GPU, by its name; None if it is not known."""
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def count_operations(step: Callable[[], "Step"], ds_config: dict[str, Any], world: World) -> Throughput | None:
    """Count the operations of a run's step before there is a model; it takes seconds, on rank 0 alone.

    Args:
        step: makes what is counted.

    Returns:
        None without a GPU, and on other ranks, which log nothing.
    """
    import torch

    if world.rank != 0 or not torch.cuda.is_available():
        return None
    from unimo3.training.plan.memory import Sharding
    from unimo3.training.plan.step_trace import trace_step

    dtype = Sharding(ds_config).dtype
    try:
        with torch.random.fork_rng():
            flops = trace_step(step(), dtype, activation_checkpointing=False).flops
    except Exception as error:  # a model that runs need not run without values; it trains all the same
        log.warning("tflops and mfu are not logged: a step cannot be counted (%s: %s)", type(error).__name__, error)
        return None
    return Throughput(flops, world.size, None if dtype == torch.float32 else peak_flops(torch.cuda.get_device_name()))
