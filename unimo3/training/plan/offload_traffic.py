"""What a rank moves to and from main memory and NVMe in an optimizer step, if states are offloaded.

Source: ZeRO-Offload, arXiv 2101.06840; ZeRO-Infinity, arXiv 2104.07857; DeepSpeed 0.19, runtime/zero/stage3.py.
"""

from unimo3.training.plan.memory import ModelSizes, Sharding, rank_memory


def offload_traffic(sizes: ModelSizes, sharding: Sharding, num_micro_steps: int, num_ranks: int) -> dict[str, int]:
    """Bytes of a rank in a step, in both directions: over the host's bus, and to and from NVMe."""
    # Of a rank's part: weights up in every pass and down after the step, gradients down.
    part = sum(map(sum, sizes.groups)) / num_ranks
    weights = (2 * num_micro_steps + 1) * sharding.weight_bytes if sharding.offloads_weights else 0
    gradients = num_micro_steps * sharding.gradient_bytes if sharding.offloads_optimizer else 0
    # Master weights and moments are read and written, gradients written and read.
    in_files = rank_memory(sizes, sharding, num_ranks).nvme
    return {"host": int(part * (weights + gradients)), "nvme": 2 * sum(in_files.values())}
