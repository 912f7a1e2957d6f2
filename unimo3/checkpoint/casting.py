"""A tensor's values cast to the type they are written in, piece by piece, and what became of them.

Source: IEEE 754 for the ranges of half precision; largest value of float16 65504, of bfloat16 about 3.39e38.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unimo3.checkpoint.block_sums import BlockSums
from unimo3.checkpoint.safetensors_writer import bytes_of

OnOverflow = Literal["error", "clamp", "keep-fp32"]

_UNSIGNED = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: as users see it.
        dtype: as written.
        largest: magnitude in the source.
        num_over_range: values of the source beyond the target type's largest.
        num_flushed: values that became zero.
        sha256: of the bytes as written.
    """

    name: str
    shape: list[int]
    dtype: str
    largest: float
    num_over_range: int
    num_flushed: int
    sha256: str


class Workspace:
    """A thread's memory for the piece it works on.

    Used again for every piece: malloc would retain several times as much, since each thread has its own heap.

    Args:
        num_elements: of the largest piece.
    """

    def __init__(self, num_elements: int):
        self._num_elements = num_elements
        self._tensors: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, purpose: str, dtype: torch.dtype, count: int) -> Tensor:
        """Memory for `count` elements, with arbitrary content of an earlier use for that purpose."""
        key = (purpose, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(self._num_elements, dtype=dtype)
        return self._tensors[key][:count]

    def cast(self, purpose: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """A piece as another type."""
        return self.take(purpose, dtype, piece.numel()).copy_(piece)


class Casting:
    """Casts one tensor and counts; its pieces come in order.

    Args:
        wanted: type that floating-point values should have; values beyond its largest are over range.
        written: type they get, another one if the tensor stays in float32.
        clamp: values over range become the largest there is.
        is_read_back: whether SHA-256 is taken of the bytes as they are read back, instead of here.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        wanted: torch.dtype,
        written: torch.dtype,
        clamp: bool,
        is_read_back: bool = False,
    ):
        self._name, self._shape, self._written, self._clamp = name, shape, written, clamp
        self._limit = torch.finfo(wanted).max
        self._largest = 0.0
        self._num_not_finite = self._num_over = self._num_flushed = 0
        self._digest: Any = BlockSums() if is_read_back else hashlib.sha256()

    def cast(self, piece: Tensor, space: Workspace) -> Tensor:
        """The next piece as it is written; values other than floating-point numbers are unchanged.

        Args:
            piece: contiguous, one-dimensional, not empty.

        Returns:
            The piece itself, or a part of the workspace.
        """
        converted = self._cast_floating(piece, space) if piece.is_floating_point() else piece
        self._digest.update(bytes_of(converted))
        return converted

    @property
    def digest(self) -> str:
        """SHA-256 of all pieces as written; their `BlockSums` if they are to be read back."""
        digest: str = self._digest.hexdigest()
        return digest

    def report(self, sha256: str) -> TensorReport:
        """What became of all pieces."""
        return TensorReport(
            self._name,
            list(self._shape),
            str(self._written).removeprefix("torch."),
            self._largest,
            self._num_over,
            self._num_flushed,
            sha256,
        )

    def problem(self) -> str:
        """Why the tensor cannot be written; empty if it can."""
        count = self._shape.numel()
        if self._num_not_finite:
            return (
                f"{self._name}: {self._num_not_finite} of {count} values are not finite; export an earlier checkpoint "
                "with --tag"
            )
        if not self._clamp and self._num_over and self._largest > torch.finfo(self._written).max:
            return (
                f"{self._name}: {self._num_over} of {count} values, up to {self._largest:.6g}, exceed "
                f"{self._limit:.6g}; use --dtype bf16 or fp32, or --on-overflow clamp or keep-fp32"
            )
        return ""

    def _cast_floating(self, piece: Tensor, space: Workspace) -> Tensor:
        # A half type would round the limit to its own precision before comparing.
        piece = space.cast("wide", piece, torch.float32) if piece.dtype.itemsize < 4 else piece
        largest = largest_of(piece)
        if math.isfinite(largest):
            self._largest = max(self._largest, largest)
        else:
            self._num_not_finite += piece.numel() - int(torch.isfinite(piece).sum())
        if largest > self._limit:
            self._num_over += int((piece.abs() > self._limit).sum())
            if self._clamp:
                piece = piece.clamp(-self._limit, self._limit)
        if piece.dtype == self._written:
            return piece
        converted = space.cast("cast", piece, self._written)
        self._num_flushed += _num_flushed(piece, converted, space)
        return converted


def largest_of(piece: Tensor) -> float:
    """Largest magnitude; NaN if any value is."""
    # One NaN makes both of them NaN.
    low, high = torch.aminmax(piece)
    return max(abs(float(low)), abs(float(high)))


def _num_flushed(before: Tensor, after: Tensor, space: Workspace) -> int:
    """How many values became zero.

    Zeros of either sign are looked for among the bits, and only their sources are counted: several times as fast as
    counting both tensors, and this runs over every value of the model.
    """
    integer, unsigned = _UNSIGNED[after.dtype.itemsize]
    bits = after.view(integer).numpy().view(unsigned)
    unsigned_bits = space.take("bits", integer, after.numel()).numpy().view(unsigned)
    is_zero = space.take("zeros", torch.bool, after.numel()).numpy()
    np.equal(np.left_shift(bits, 1, out=unsigned_bits), 0, out=is_zero)
    return int(np.count_nonzero(before.numpy()[is_zero]))
