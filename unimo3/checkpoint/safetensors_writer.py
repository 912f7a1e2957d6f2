"""A safetensors file whose tensors are written in pieces, in any order and from several threads.

    8 bytes    length of the header, little endian
    header     JSON: {"__metadata__": {"format": "pt"}, "name": {"dtype", "shape", "data_offsets"}, ...}, then spaces
    tensors    one after the other: wider types first, each type in the order of names, so that all are aligned

The library's ``save_file`` needs all tensors at once; the bytes are the same.

Source: https://github.com/huggingface/safetensors, README (format) and safetensors/src/tensor.rs (order of tensors).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimo3.checkpoint.block_sums import BlockSums
from unimo3.checkpoint.direct_io import CHUNK_BYTES, DirectFile
from unimo3.errors import CheckpointError

# In the order in which the library lays tensors out: the last ones first.
_TYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_TYPES = {name: dtype for dtype, name in _TYPE_NAMES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_TYPE_NAMES)}
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorLocation:
    """A tensor's type and position in a file.

    Attributes:
        start: offset in the file, in bytes.
    """

    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def num_bytes(self) -> int:
        """Size in the file, in bytes."""
        return num_bytes_of(self.dtype, self.shape)


def num_bytes_of(dtype: torch.dtype, shape: torch.Size) -> int:
    """Bytes of a tensor."""
    return shape.numel() * dtype.itemsize


class SafetensorsWriter:
    """One file, open for writing, whose header is written at once.

    Attributes:
        path: the file.

    Args:
        path: a new one.
        tensors: types and shapes by name.

    Raises:
        CheckpointError: the format has no such type.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, torch.Size]]):
        for name, (dtype, _) in tensors.items():
            if dtype not in _TYPE_NAMES:
                raise CheckpointError(f"{name}: is of type {dtype}, which safetensors files cannot contain")
        self.path = path
        header, self._locations = _layout(tensors)
        end = max((location.start + location.num_bytes for location in self._locations.values()), default=len(header))
        self._file = DirectFile(path, end)
        try:
            self._file.write(memoryview(header), 0)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, first: int, piece: Tensor) -> None:
        """Write elements [first, first + n) of a tensor.

        Args:
            piece: n elements of the tensor's type, contiguous, on the CPU.
        """
        location = self._locations[name]
        assert piece.dtype == location.dtype
        assert first + piece.numel() <= location.shape.numel()
        self._file.write(bytes_of(piece), location.start + first * location.dtype.itemsize)

    def read_back(self, name: str) -> tuple[str, str]:
        """SHA-256 and `BlockSums` of a tensor's bytes as they are in the file now."""
        location, digest, sums = self._locations[name], hashlib.sha256(), BlockSums()
        end = location.start + location.num_bytes
        for start in range(location.start, end, CHUNK_BYTES):
            piece = self._file.read(start, min(CHUNK_BYTES, end - start))
            digest.update(piece)
            sums.update(piece)
        return digest.hexdigest(), sums.hexdigest()

    def flush(self) -> None:
        """Force to disk what was written."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Where a file's tensors are.

    Raises:
        CheckpointError: it is no safetensors file, or its tensors do not fill it one after the other.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            described: dict[str, Any] = json.loads(file.read(length))
        described.pop("__metadata__", None)
        locations = {}
        end = 0
        for name, entry in sorted(described.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            first, last = entry["data_offsets"]
            location = TensorLocation(_TYPES[entry["dtype"]], torch.Size(entry["shape"]), 8 + length + first)
            if first != end or last - first != location.num_bytes:
                raise ValueError(f"{name} at bytes {first} to {last}, not {end} to {end + location.num_bytes}")
            locations[name], end = location, last
        if 8 + length + end != size:
            raise ValueError(f"tensors up to byte {8 + length + end} in a file of {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no complete safetensors file ({type(error).__name__}: {error})") from error
    return locations


def _layout(tensors: dict[str, tuple[torch.dtype, torch.Size]]) -> tuple[bytes, dict[str, TensorLocation]]:
    """The length and header that a file begins with, and the locations of its tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _sorted_as_laid_out(tensors):
        dtype, shape = tensors[name]
        first, end = end, end + num_bytes_of(dtype, shape)
        entries[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    locations = {
        name: TensorLocation(dtype, shape, 8 + len(header) + entries[name]["data_offsets"][0])
        for name, (dtype, shape) in tensors.items()
    }
    return len(header).to_bytes(8, "little") + header, locations


def _sorted_as_laid_out(tensors: dict[str, tuple[torch.dtype, torch.Size]]) -> Iterable[str]:
    return sorted(tensors, key=lambda name: (-_RANKS[tensors[name][0]], name.encode()))
