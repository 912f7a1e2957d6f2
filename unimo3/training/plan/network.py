"""Bytes that ranks exchange in an optimizer step under ZeRO, and the seconds this takes on a stated fabric.

With w bytes of weights, g bytes of gradients, and m micro-steps, DeepSpeed exchanges in a step:

    stage 1    gradients once, updated weights once                       2 g + w
    stage 2    gradients in every micro-step, updated weights once        2 g m + w
    stage 3    weights for each pass, gradients, in every micro-step      (2 w + g) m
    hpZ        the same, but only the first gathering is over all ranks   w + g m, and w (2 m - 1) within a node

A gradient of stages 1 and 2 counts twice: DeepSpeed reduces it to all ranks, which is a reduce-scatter and an
all-gather, unless `use_multi_rank_bucket_allreduce` is false. Of a collective over n ranks, (n - 1) / n of the bytes
reach each rank. ZeRO++ gathers weights in 8 bits and reduces gradients in 4; scales of blocks are not counted.

Persistent parameters of stage 3 are gathered once a step. A parameter that stays gathered between the passes
(`stage3_max_reuse_distance`) counts as gathered again: the result is an upper bound. Features of the contrast and
metrics are not counted.

Source: ZeRO, arXiv 1910.02054, section 7; ZeRO++, arXiv 2306.10209, for hpZ; DeepSpeed 0.19, stage_1_and_2.py
(allreduce_and_scatter) and stage3.py (invalidate_secondary_tensor).
"""

from dataclasses import dataclass

from unimo3.training.plan.memory import ModelSizes, Sharding, gatherable_sizes
from unimo3.training.plan.settings import Machine

_QUANTIZED_WEIGHT_BYTES, _QUANTIZED_GRADIENT_BYTES = 1, 0.5


@dataclass(frozen=True)
class Traffic:
    """Sizes of the collectives of one step, before the factor (n - 1) / n.

    Attributes:
        over_all: bytes of those over all ranks, by what they exchange.
        within_node: bytes of those among the ranks of a node, the same.
        node_ranks: ranks of the latter.
    """

    over_all: dict[str, int]
    within_node: dict[str, int]
    node_ranks: int

    def received_bytes(self, num_ranks: int) -> float:
        """Bytes that reach each rank in a step; it sends as many."""
        return _arriving(sum(self.over_all.values()), num_ranks) + _arriving(
            sum(self.within_node.values()), self.node_ranks
        )


def step_traffic(sizes: ModelSizes, sharding: Sharding, num_micro_steps: int) -> Traffic:
    """What the ranks exchange in an optimizer step."""
    zero, weight_bytes = sharding.zero, sharding.weight_bytes
    gradient_bytes = _QUANTIZED_GRADIENT_BYTES if zero.zero_quantized_gradients else sharding.reduced_bytes
    gradients = int(sum(map(sum, sizes.groups)) * gradient_bytes)
    if sharding.stage < 3:
        num_reductions = num_micro_steps if sharding.stage == 2 else 1
        is_all_reduce = zero.use_multi_rank_bucket_allreduce or not zero.reduce_scatter
        updated = sum(map(sum, sizes.groups)) * weight_bytes
        return Traffic(
            {"gradients": gradients * num_reductions * (2 if is_all_reduce else 1), "weights": updated}, {}, 1
        )
    num_gathered = sum(gatherable_sizes(sizes, sharding))
    persistent = (sizes.total - num_gathered) * weight_bytes
    gathered = num_gathered * (_QUANTIZED_WEIGHT_BYTES if zero.zero_quantized_weights else weight_bytes)
    num_gathers = 2 * num_micro_steps
    within_node = {}
    if sharding.secondary_ranks > 1:
        within_node = {"weights": gathered * (num_gathers - 1)}
        num_gathers = 1
    weights = gathered * num_gathers + persistent
    return Traffic(
        {"gradients": gradients * num_micro_steps, "weights": weights}, within_node, sharding.secondary_ranks
    )


def network_s(traffic: Traffic, machine: Machine) -> float:
    """Seconds of a step in which computation waits for collectives."""
    seconds = _seconds(sum(traffic.over_all.values()), machine.num_gpus, machine)
    seconds += _seconds(sum(traffic.within_node.values()), traffic.node_ranks, machine)
    return seconds * (1 - machine.fabric.overlap)


def _arriving(size: float, num_ranks: int) -> float:
    return size * (num_ranks - 1) / num_ranks


def _seconds(size: float, num_ranks: int, machine: Machine) -> float:
    """Of collectives of that size: a rank receives over its link, and a node over the network cards of all its ranks.

    This is what rings reach that enter each node once by each of its network cards.
    """
    fabric = machine.fabric
    seconds = _arriving(size, num_ranks) / fabric.node_bytes_s
    num_nodes = -(-num_ranks // fabric.gpus_per_node)
    if num_nodes > 1:
        node_bytes_s = fabric.gpus_per_node * fabric.network_bytes_s
        seconds = max(seconds, _arriving(size, num_nodes) / node_bytes_s)
    return seconds
