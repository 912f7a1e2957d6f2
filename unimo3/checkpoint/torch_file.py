"""torch.save's files without their tensors: the structure is unpickled, restricted; tensors are read when asked for.

Reading by offset caches nothing: memory is bounded by the caller's tensors, however large the files are.

Source: torch.serialization; with ``map_location="meta"`` it leaves each storage's offset in the file.
"""

import os
import pickle
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimo3.errors import CheckpointError

_MAX_OPEN_FILES = 128


class _Number(int):
    """Stands for one of DeepSpeed's enumerations where DeepSpeed is not imported."""


class _Record:
    """Stands for one of DeepSpeed's classes that only contain values."""


# DeepSpeed's plain classes; anything else that is not plain data is refused.
_ALLOWED_GLOBALS: dict[str, dict[str, type]] = {
    "deepspeed.runtime.fp16.loss_scaler": {"LossScaler": _Record, "DynamicLossScaler": _Record},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum": _Number},
    "deepspeed.utils.tensor_fragment": {"fragment_address": _Record},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        start: offset of its storage in the file, in bytes.
        skipped: elements of the storage before its first one.
    """

    path: Path
    start: int
    skipped: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def read(self) -> Tensor:
        """The complete tensor."""
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = self._elements(0, extent if self.numel() else 0)
        return flat.as_strided(self.shape, self.stride) if self.numel() else flat.view(self.shape)

    def read_into(self, target: Tensor, first: int) -> None:
        """Fill a contiguous CPU tensor of the same type with the elements from `first` on, of a tensor in one run.

        Raises:
            CheckpointError: the file has another type.
        """
        if target.dtype != self.dtype:
            raise CheckpointError(
                f"{self.path}: contains {self.dtype} where {target.dtype} is expected; master weights and moments of "
                "another type than float32 are not supported"
            )
        _read(self.path, self.start + (self.skipped + first) * self.dtype.itemsize, target)

    def _elements(self, first: int, count: int) -> Tensor:
        target = torch.empty(count, dtype=self.dtype)
        self.read_into(target, first)
        return target


def load_structure(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, with a `StoredTensor` for each tensor.

    Raises:
        CheckpointError: it cannot be read, or contains more than tensors and plain data.
    """
    try:
        with torch.serialization.safe_globals(_allowed_classes()):
            loaded: dict[str, Any] = torch.load(path, map_location="meta", weights_only=True)
        if not isinstance(loaded, dict):
            raise TypeError(f"a {type(loaded).__name__} where a dict is expected")
        return {key: _replace_tensors(value, path) for key, value in loaded.items()}
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: contains more than tensors and plain data, refused: {reason}") from error
    except Exception as error:  # damage and malice end in errors of any kind
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); verify the checkpoint"
        ) from error


def _replace_tensors(value: Any, path: Path) -> Any:
    if isinstance(value, Tensor):
        start = value.untyped_storage()._checkpoint_offset
        if start is None:
            raise AttributeError("a tensor without an offset in the file")
        return StoredTensor(path, start, int(value.storage_offset()), value.shape, value.stride(), value.dtype)
    if isinstance(value, dict):
        return {key: _replace_tensors(entry, path) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_replace_tensors(entry, path) for entry in value)
    return value


class _OpenFile:
    """Open as long as it is referenced: a thread may read a file that another has just dropped from the list."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open_files: OrderedDict[Path, _OpenFile] = OrderedDict()
_open_files_lock = threading.Lock()


def close_files() -> None:
    """Close all cached files: a removed file then leaves the disk."""
    with _open_files_lock:
        _open_files.clear()


def _read(path: Path, start: int, target: Tensor) -> None:
    """Fill a tensor from a file's bytes; a few files stay open, since a checkpoint's are read by turns."""
    with _open_files_lock:
        if path not in _open_files:
            if len(_open_files) == _MAX_OPEN_FILES:
                _open_files.popitem(last=False)
            _open_files[path] = _OpenFile(path)
        _open_files.move_to_end(path)
        file = _open_files[path]
    memory = memoryview(target.view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < len(memory):
        count = os.preadv(file.descriptor, [memory[done:]], start + done)
        if not count:
            raise CheckpointError(f"{path}: ends {len(memory) - done} bytes early; verify the checkpoint")
        done += count


def _allowed_classes() -> list[Any]:
    """Pairs of a class and its name in the file.

    A class of DeepSpeed is taken where its module is imported already, as in an engine that resumes. Importing it just
    to read weights would cost a second and would run more code than is needed.
    """
    return [
        (getattr(sys.modules.get(module), name, stand_in), f"{module}.{name}")
        for module, names in _ALLOWED_GLOBALS.items()
        for name, stand_in in names.items()
    ]
