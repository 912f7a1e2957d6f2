"""Types of weights and of computations by the short names that options and files have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_of(name: str) -> torch.dtype:
    """The type that one of `DTYPES` names."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype
