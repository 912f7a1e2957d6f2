"""Block sizes, warps and stages of the Triton kernels, by kernel, head width, dtype, lengths and compute capability.

How the entries were found: none has been timed on a GPU. ``benchmarks/kernel_static.py --search`` compiles every
candidate (blocks of 32 and 64 for half types, of 16 to 64 for float32; 4 and 8 warps; two stages) for all it would
support, with seven levels, gate, padding and dropout, and for heads of 64, the recipes' width, with fewer levels and
without padding or dropout too. It drops those that spill registers, exceed a block's shared memory or leave fewer than
8 warps to a multiprocessor. Of the rest it takes the largest block; among equals the one with most warps resident, then
the one with fewest registers. Blocks of 128 are not among them: texts of 50 tokens and images of 197 to 442 would fill
them badly.

``UNIMO3_AUTOTUNE=1`` times candidates on this GPU instead, see launch.py.

Source: triton 3.9's compiler; the programming guide of CUDA for limits of each compute capability.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and stages of its pipelined loop."""

    queries: int
    keys: int
    warps: int
    stages: int


# What a program owns a block of decides between two entries: queries, but keys in backward_key.
SHORT_LENGTH = 32
CAPABILITIES = (80, 90, 100)
KERNELS = ("forward", "backward_query", "backward_key")
# Head widths are padded to these.
WIDTHS = (32, 64, 128)

# {capability: {(kernel, width): (for up to SHORT_LENGTH, for more)}}
HALF: dict[int, dict[tuple[str, int], tuple[Blocks, Blocks]]] = {
    80: {
        ("forward", 32): (Blocks(32, 64, 4, 2), Blocks(64, 64, 8, 2)),
        ("forward", 64): (Blocks(32, 64, 4, 2), Blocks(64, 64, 8, 2)),
        ("forward", 128): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_query", 32): (Blocks(32, 64, 4, 2), Blocks(64, 64, 4, 2)),
        ("backward_query", 64): (Blocks(32, 64, 8, 2), Blocks(64, 32, 4, 2)),
        ("backward_query", 128): (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
        ("backward_key", 32): (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
        ("backward_key", 64): (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
        ("backward_key", 128): (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    },
    90: {
        ("forward", 32): (Blocks(32, 64, 8, 2), Blocks(64, 64, 4, 2)),
        ("forward", 64): (Blocks(32, 64, 8, 2), Blocks(64, 64, 4, 2)),
        ("forward", 128): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_query", 32): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_query", 64): (Blocks(32, 64, 4, 2), Blocks(64, 32, 8, 2)),
        ("backward_query", 128): (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
        ("backward_key", 32): (Blocks(32, 32, 4, 2), Blocks(64, 64, 4, 2)),
        ("backward_key", 64): (Blocks(64, 32, 8, 2), Blocks(32, 64, 4, 2)),
        ("backward_key", 128): (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
    },
    100: {
        ("forward", 32): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("forward", 64): (Blocks(32, 32, 4, 2), Blocks(64, 64, 8, 2)),
        ("forward", 128): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_query", 32): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_query", 64): (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_query", 128): (Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 2)),
        ("backward_key", 32): (Blocks(32, 32, 4, 2), Blocks(64, 64, 8, 2)),
        ("backward_key", 64): (Blocks(64, 32, 8, 2), Blocks(64, 64, 8, 2)),
        ("backward_key", 128): (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    },
}
# Without tensor cores, one entry for all lengths and capabilities.
FLOAT32: dict[tuple[str, int], Blocks] = {
    ("forward", 32): Blocks(32, 64, 8, 2),
    ("forward", 64): Blocks(64, 32, 8, 2),
    ("forward", 128): Blocks(32, 16, 8, 2),
    ("backward_query", 32): Blocks(64, 32, 8, 2),
    ("backward_query", 64): Blocks(32, 32, 8, 2),
    ("backward_query", 128): Blocks(16, 32, 8, 2),
    ("backward_key", 32): Blocks(64, 32, 8, 2),
    ("backward_key", 64): Blocks(32, 32, 8, 2),
    ("backward_key", 128): Blocks(16, 64, 8, 2),
}


def entry(kernel: str, dtype: torch.dtype, width: int, length: int, capability: int) -> Blocks:
    """The table's entry.

    Args:
        kernel: one of `KERNELS`.
        width: of a head, at most 128.
        length: of what a program owns a block of: queries, or keys for ``backward_key``.
        capability: one of `CAPABILITIES`.
    """
    padded = next(size for size in WIDTHS if width <= size)
    if dtype.itemsize > 2:
        return FLOAT32[kernel, padded]
    return HALF[capability][kernel, padded][length > SHORT_LENGTH]


def blocks_for(kernel: str, q: Tensor, longest: int) -> Blocks:
    """The entry for queries [B, H, T, d] on their device, and levels of up to `longest` keys."""
    length = longest if kernel == "backward_key" else q.shape[2]
    return entry(kernel, q.dtype, q.shape[-1], length, _capability(q.device))


@functools.cache
def _capability(device: torch.device) -> int:
    """Whose entries support a device."""
    if device.type != "cuda":
        return CAPABILITIES[0]
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer cards after Hopper (12) have the shared memory and the matrix instructions of 8.
    return {8: 80, 9: 90, 10: 100, 11: 100}.get(major, 80)
