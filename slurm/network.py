"""How fast all ranks of a job exchange tensors, and which node slows them down.

    {"problems": [...], "gbps", "nodes": {NODE: problem}, "gpus": {NODE: what its ranks see}}    network.json, of rank 0

Only if all of them together are below the floor are pairs of neighbouring nodes timed, each node with the one before
and the one after it: a node with two slow pairs is a slow one. With two nodes, the slow one cannot be identified.

Source: the pairwise checks of NVIDIA's nccl-tests, for the idea.
"""

import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from unimo3.distributed import choose_gpu

# 16 MiB: the bandwidth counts, not the latency.
_ROUNDS, _ELEMENTS = 4, 2**22


def measure(floor_gbps: float) -> dict[str, Any]:
    """Join the other ranks and time all-reduces; every rank calls it and gets the same.

    Args:
        floor_gbps: 10^9 bytes a second that are needed; 0: nothing is judged.

    Raises:
        ConfigError: on every rank; two would have the same GPU.
    """
    gpu = torch.cuda.is_available()
    seen = choose_gpu() if gpu else ""
    dist.init_process_group("nccl" if gpu else "gloo")
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (os.environ.get("SLURMD_NODENAME", socket.gethostname()), seen))
    names = [name for name, _ in gathered]
    nodes = list(dict.fromkeys(names))
    gpus = {node: "; ".join(seen for name, seen in gathered if name == node) for node in nodes if gpu}
    gbps = _slowest(_gbps(None))
    if gbps >= floor_gbps:
        return {"problems": [], "gbps": gbps, "nodes": {}, "gpus": gpus}
    problem = (
        f"an all-reduce of {4 * _ELEMENTS / 1e6:.0f} MB over {', '.join(nodes[:2])}"
        f"{f' and {len(nodes) - 2} more' if len(nodes) > 2 else ''} runs at {gbps:.2f} GB/s, below "
        f"MIN_ALLREDUCE_GBPS {floor_gbps:g}"
    )
    slow = {nodes[0]: problem} if len(nodes) == 1 else slow_nodes(_time_pairs(nodes, names), floor_gbps)
    return {"problems": [problem], "gbps": gbps, "nodes": slow, "gpus": gpus}


def rounds_of(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Every neighbouring pair of a ring of nodes once, in rounds in which no node is in two pairs."""
    if num_nodes == 2:
        return [[(0, 1)]]
    pairs = [(first, (first + 1) % num_nodes) for first in range(num_nodes)]
    last = pairs.pop() if num_nodes % 2 else None
    return [pairs[::2], pairs[1::2]] + ([[last]] if last else [])


def slow_nodes(gbps: dict[tuple[str, str], float], floor_gbps: float) -> dict[str, str]:
    """The nodes that are slow with both of their neighbours, with what was measured; none if all are.

    Args:
        gbps: of each pair of neighbours.
    """
    slow = {}
    nodes = dict.fromkeys(node for pair in gbps for node in pair)
    for node in nodes:
        rates = {(set(pair) - {node}).pop(): rate for pair, rate in gbps.items() if node in pair}
        if len(rates) > 1 and all(rate < floor_gbps for rate in rates.values()):
            others = " and ".join(f"{rate:.2f} GB/s with {other}" for other, rate in rates.items())
            slow[node] = f"an all-reduce runs at {others}, below MIN_ALLREDUCE_GBPS {floor_gbps:g}"
    return slow if len(slow) < len(nodes) else {}


def _time_pairs(nodes: list[str], names: list[str]) -> dict[tuple[str, str], float]:
    """10^9 bytes a second of every pair of neighbours; disjoint pairs at the same time."""
    rates: dict[tuple[str, str], float] = {}
    for pairs in rounds_of(len(nodes)):
        mine = None
        for first, second in pairs:
            ranks = [rank for rank, name in enumerate(names) if name in (nodes[first], nodes[second])]
            group = dist.new_group(ranks)  # every rank makes every group
            if dist.get_rank() in ranks:
                mine = (nodes[first], nodes[second]), group
        results: list[Any] = [None] * len(names)
        dist.all_gather_object(results, (mine[0], _gbps(mine[1])) if mine else None)
        for pair, rate in (entry for entry in results if entry):
            rates[pair] = min(rate, rates.get(pair, rate))
    return rates


def _gbps(group: Any) -> float:
    """10^9 bytes a second of an all-reduce, by the slowest round but one."""
    values = torch.ones(_ELEMENTS, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if values.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    dist.barrier(group)
    return values.nbytes / sorted(seconds)[-2] / 1e9


def _slowest(gbps: float) -> float:
    """The lowest rate of all ranks."""
    rates: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(rates, gbps)
    return min(rates)
