"""torch.save's files without their tensors: the structure is unpickled, restricted; tensors are read when asked for.

Reading by offset keeps nothing resident: memory is what the caller holds, however large the files are.

Source: torch.serialization; with ``map_location="meta"`` it leaves each storage's offset in the file.
"""

import importlib
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimo3.errors import CheckpointError

# DeepSpeed's own plain classes; anything else that is no plain data is refused.
_ALLOWED_GLOBALS = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
_MAX_OPEN_FILES = 128


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        start: byte of the file at which its storage begins.
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
        """The whole tensor."""
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = self._elements(0, extent if self.numel() else 0)
        return flat.as_strided(self.shape, self.stride) if self.numel() else flat.view(self.shape)

    def read_into(self, target: Tensor, first: int) -> None:
        """Fill a contiguous CPU tensor of the same type with the elements from `first` on, of a tensor in one run."""
        _read(self.path, self.start + (self.skipped + first) * self.dtype.itemsize, target)

    def _elements(self, first: int, count: int) -> Tensor:
        target = torch.empty(count, dtype=self.dtype)
        self.read_into(target, first)
        return target


def load_structure(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, with a `StoredTensor` for each tensor.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain data.
    """
    try:
        with torch.serialization.safe_globals(_allowed_classes()):
            loaded: dict[str, Any] = torch.load(path, map_location="meta", weights_only=True)
        return _replace_tensors(loaded, path)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: holds more than tensors and plain data, refused: {reason}") from error
    except (OSError, RuntimeError, EOFError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); verify the checkpoint") from error


def _replace_tensors(value: Any, path: Path) -> Any:
    if isinstance(value, Tensor):
        start = value.untyped_storage()._checkpoint_offset
        if start is None:
            raise AttributeError("a tensor without a place in the file")
        return StoredTensor(path, start, int(value.storage_offset()), value.shape, value.stride(), value.dtype)
    if isinstance(value, dict):
        return {key: _replace_tensors(entry, path) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_replace_tensors(entry, path) for entry in value)
    return value


_open_files: OrderedDict[Path, int] = OrderedDict()


def _read(path: Path, start: int, target: Tensor) -> None:
    """Fill a tensor from a file's bytes; a few files stay open, since a checkpoint's are read by turns."""
    if path not in _open_files:
        if len(_open_files) == _MAX_OPEN_FILES:
            os.close(_open_files.popitem(last=False)[1])
        _open_files[path] = os.open(path, os.O_RDONLY)
    _open_files.move_to_end(path)
    memory = memoryview(target.view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < len(memory):
        count = os.preadv(_open_files[path], [memory[done:]], start + done)
        if not count:
            raise CheckpointError(f"{path}: ends {len(memory) - done} bytes early; verify the checkpoint")
        done += count


def _allowed_classes() -> list[Any]:
    allowed = []
    for module, names in _ALLOWED_GLOBALS.items():
        loaded = importlib.import_module(module)
        allowed += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return allowed
