"""Which Triton kernels run for which lengths, with which block sizes, warps and stages.

How the entries were found: none has been timed on a GPU. ``benchmarks/kernel_static.py --search`` compiles every
candidate for all it would support, with seven levels, gate, padding and dropout, and for heads of 64, the recipes'
width, with fewer levels and without padding or dropout too. It drops those that spill registers, exceed the shared
memory of a block or leave fewer than 8 warps to a multiprocessor. Of the rest it takes the one whose innermost loop
issues the fewest instructions for 64 queries by 64 keys, summed over warps: what several warps compute alike counts as
often as it is computed. Blocks of 128 are not among them: texts of 50 tokens and images of 197 to 442 would fill them
badly. On 9.0 three stages are among the candidates: of most kernels they issue as many instructions as two or up to 4 %
more, of `backward_key` and `backward_fused` they spill.

``UNIMO3_AUTOTUNE=1`` times candidates on this GPU instead, see launch.py.

Source: triton 3.9's compiler; the programming guide of CUDA for limits of each compute capability.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Queries and keys of a block at the most, warps of a program, and stages of its pipelined loop.

    One block covers the keys of a ``_short`` kernel and the queries of ``backward_fused``: longer ones go elsewhere.
    """

    queries: int
    keys: int
    warps: int
    stages: int


KERNELS = (
    "forward",
    "forward_short",
    "backward_query",
    "backward_query_short",
    "backward_key",
    "backward_fused",
)
# The smallest block that a matrix product takes.
MIN_BLOCK = 16
CAPABILITIES = (80, 90, 100)
# Head widths are padded to these.
WIDTHS = (32, 64, 128)

# Who takes a call with one level (the interaction in_layer, and first layers): these kernels, or with True PyTorch's
# attention, one_level.py. To be decided by the times of `make gpu-check`.
ONE_LEVEL_BY_TORCH = False

# By compute capability, padded head width and kernel.
HALF: dict[int, dict[int, dict[str, Blocks]]] = {
    80: {
        32: {
            "forward": Blocks(64, 32, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 64, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(64, 64, 4, 2),
            "backward_fused": Blocks(32, 64, 4, 2),
        },
        64: {
            "forward": Blocks(32, 64, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 32, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(32, 64, 4, 2),
            "backward_fused": Blocks(32, 64, 4, 2),
        },
        128: {
            "forward": Blocks(32, 64, 4, 2),
            "forward_short": Blocks(32, 64, 4, 2),
            "backward_query": Blocks(32, 64, 8, 2),
            "backward_query_short": Blocks(64, 64, 8, 2),
            "backward_key": Blocks(64, 32, 8, 2),
            "backward_fused": Blocks(64, 32, 8, 2),
        },
    },
    90: {
        32: {
            "forward": Blocks(64, 64, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 64, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(64, 64, 4, 2),
            "backward_fused": Blocks(64, 64, 4, 2),
        },
        64: {
            "forward": Blocks(64, 64, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 32, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(64, 64, 4, 2),
            "backward_fused": Blocks(64, 64, 4, 2),
        },
        128: {
            "forward": Blocks(64, 32, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(32, 32, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(32, 64, 4, 2),
            "backward_fused": Blocks(32, 32, 4, 2),
        },
    },
    100: {
        32: {
            "forward": Blocks(64, 64, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 64, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(64, 64, 4, 2),
            "backward_fused": Blocks(64, 64, 8, 2),
        },
        64: {
            "forward": Blocks(64, 64, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 32, 4, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(64, 64, 4, 2),
            "backward_fused": Blocks(64, 32, 4, 2),
        },
        128: {
            "forward": Blocks(32, 64, 4, 2),
            "forward_short": Blocks(64, 64, 4, 2),
            "backward_query": Blocks(64, 32, 8, 2),
            "backward_query_short": Blocks(64, 64, 4, 2),
            "backward_key": Blocks(32, 64, 4, 2),
            "backward_fused": Blocks(32, 32, 4, 2),
        },
    },
}
# With dropout, where other blocks issue fewer instructions then: looked for at the recipes' width on 9.0.
WITH_DROPOUT: dict[int, dict[int, dict[str, Blocks]]] = {
    90: {64: {"forward_short": Blocks(64, 64, 4, 3), "backward_query": Blocks(64, 64, 4, 2)}},
}
# Without tensor cores, one entry for all capabilities.
FLOAT32: dict[int, dict[str, Blocks]] = {
    32: {
        "forward": Blocks(64, 32, 8, 2),
        "forward_short": Blocks(32, 64, 8, 2),
        "backward_query": Blocks(64, 32, 8, 2),
        "backward_query_short": Blocks(32, 64, 8, 2),
        "backward_key": Blocks(32, 64, 8, 2),
        "backward_fused": Blocks(32, 32, 8, 2),
    },
    64: {
        "forward": Blocks(32, 64, 8, 2),
        "forward_short": Blocks(32, 64, 8, 2),
        "backward_query": Blocks(32, 32, 8, 2),
        "backward_query_short": Blocks(32, 32, 8, 2),
        "backward_key": Blocks(16, 64, 8, 2),
        "backward_fused": Blocks(32, 32, 8, 2),
    },
    128: {
        "forward": Blocks(32, 16, 8, 2),
        "forward_short": Blocks(16, 64, 8, 2),
        "backward_query": Blocks(16, 64, 8, 2),
        "backward_query_short": Blocks(16, 64, 8, 2),
        "backward_key": Blocks(16, 64, 8, 2),
        "backward_fused": Blocks(16, 16, 8, 2),
    },
}


def forward_kernel(q: Tensor, lengths: Sequence[int], num_masks: int) -> str:
    """The kernel for queries [B, T, H, d] and levels of these lengths, with no mask, one for all, or one a level."""
    return "forward_short" if _is_one_block("forward_short", q, lengths, num_masks) else "forward"


def backward_kernels(q: Tensor, lengths: Sequence[int], num_masks: int) -> tuple[str, ...]:
    """The kernels that give all gradients, in order."""
    if q.shape[1] <= _maxima("backward_fused", q).queries:
        return ("backward_fused",)
    short = _is_one_block("backward_query_short", q, lengths, num_masks)
    query = "backward_query_short" if short else "backward_query"
    return (query, "backward_key") if max(lengths) else (query,)


def _is_one_block(kernel: str, q: Tensor, lengths: Sequence[int], num_masks: int) -> bool:
    """Whether one block covers the keys of every level, and they share their length and mask."""
    return num_masks <= 1 and len(set(lengths)) == 1 and lengths[0] <= _maxima(kernel, q).keys


def blocks_for(kernel: str, q: Tensor, longest: int, dropout: bool) -> Blocks:
    """The entry for queries [B, T, H, d] on their device, and levels of up to `longest` keys."""
    return fitted(_maxima(kernel, q, dropout), q.shape[1], longest)


def fitted(blocks: Blocks, queries: int, longest: int) -> Blocks:
    """Blocks no larger than the lengths need."""

    def enough(block: int, length: int) -> int:
        return max(MIN_BLOCK, min(block, 1 << max(0, length - 1).bit_length()))

    return blocks._replace(queries=enough(blocks.queries, queries), keys=enough(blocks.keys, longest))


def _maxima(kernel: str, q: Tensor, dropout: bool = False) -> Blocks:
    return entry(kernel, q.dtype, q.shape[-1], _capability(q.device), dropout)


def entry(kernel: str, dtype: torch.dtype, width: int, capability: int, dropout: bool = False) -> Blocks:
    """The table's entry.

    Args:
        kernel: one of `KERNELS`.
        width: of a head, at most 128.
        capability: one of `CAPABILITIES`.
    """
    padded = next(size for size in WIDTHS if width <= size)
    special = WITH_DROPOUT.get(capability, {}).get(padded, {}).get(kernel)
    if dropout and special and dtype.itemsize <= 2:
        return special
    return (FLOAT32 if dtype.itemsize > 2 else HALF[capability])[padded][kernel]


@functools.cache
def _capability(device: torch.device) -> int:
    """Whose entries support a device."""
    if device.type != "cuda":  # the interpreter, and counts without a device
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer cards after Hopper (12) have the shared memory and the matrix instructions of 8.
    return {8: 80, 9: 90, 10: 100, 11: 100}.get(major, 80)
