"""Block sizes, warps and stages of the Triton kernels.

The entries for half types are the largest of six candidates that compile for sm_90 without spills, with seven levels,
gate, padding and dropout (triton 3.9); none has been timed on a GPU. Float32 takes the smallest of them.
"""

from typing import NamedTuple

from torch import Tensor


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and stages of its pipelined loop."""

    queries: int
    keys: int
    warps: int
    stages: int


_SMALL = Blocks(32, 32, 4, 2)
# (kernel, head width up to) -> for float16 and bfloat16.
_HALF = {
    ("forward", 32): Blocks(64, 64, 4, 2),
    ("forward", 64): Blocks(64, 64, 4, 2),
    ("forward", 128): Blocks(64, 32, 4, 2),
    ("backward_query", 32): Blocks(64, 64, 4, 2),
    ("backward_query", 64): Blocks(64, 32, 4, 2),
    ("backward_query", 128): _SMALL,
    ("backward_key", 32): Blocks(64, 64, 4, 2),
    ("backward_key", 64): Blocks(64, 32, 4, 2),
    ("backward_key", 128): _SMALL,
}


def blocks_for(kernel: str, q: Tensor) -> Blocks:
    """The entry for one of ``forward``, ``backward_query``, ``backward_key`` and queries [B, H, T, d]."""
    if q.element_size() > 2:
        return _SMALL
    return next(blocks for (name, width), blocks in _HALF.items() if name == kernel and q.shape[-1] <= width)
