"""DeepSpeed's save, made to end on every rank: what fails on one is raised after all have met again.

DeepSpeed's save has barriers of its own. A rank that raised before one would leave the others waiting there for ever,
so failures to write are kept until the save is over.

Source: DeepSpeed 0.19, runtime/engine.py (save_checkpoint) and runtime/checkpoint_engine.
"""

import copy
import itertools
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from unimo3.distributed import world


class DeferringCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's writer of files.

    Attributes:
        written: this rank's files.
        failure: the first error a write met.

    Args:
        memory: keeps what would be written instead, if given.
    """

    def __init__(self, memory: "HostMemory | None" = None) -> None:
        super().__init__()
        self._memory = memory
        self.zipfile_serialization = True  # the form that torch can map into memory; export relies on it
        self.written: list[Path] = []
        self.failure: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder, or note why it could not be."""
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or note why it could not be."""
        try:
            if self._memory is not None:
                self._memory.keep(Path(path), state_dict)
                return
            super().save(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or error


class HostMemory:
    """Copies of what a save would write, whose tensors are kept for the next one: its second copy costs no pages.

    It holds as many bytes as this rank's files have.
    """

    def __init__(self) -> None:
        self.files: list[tuple[Path, Any]] = []
        self._tensors: dict[tuple[str, int], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors kept."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def begin(self) -> None:
        """Forget the files of the save before."""
        self.files = []

    def keep(self, path: Path, content: Any) -> None:
        """Copy what is to be written to `path`."""
        numbers = itertools.count()
        copies: dict[int, Tensor] = {}

        def copy_of(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:  # one that stands there twice is one in the file
                place = (path.name, next(numbers))
                held = self._tensors.get(place)
                if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                    pinned = tensor.is_cuda
                    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                    self._tensors[place] = held
                copies[id(tensor)] = held.copy_(tensor.detach(), non_blocking=True)
            return copies[id(tensor)]

        def walk(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copy_of(value)
            if isinstance(value, dict):
                copied = copy.copy(value)  # of its kind, such as OrderedDict
                for key, entry in value.items():
                    copied[key] = walk(entry)
                return copied
            if type(value) in (list, tuple):
                return type(value)(walk(entry) for entry in value)
            return copy.deepcopy(value)

        self.files.append((path, walk(content)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def capture_engine_files(engine: Any, staging: Path, memory: HostMemory) -> None:
    """Keep in `memory` what DeepSpeed would write into the folder `staging`; every rank calls it."""
    memory.begin()
    _save(engine, staging, DeferringCheckpointEngine(memory))


def write_captured(memory: HostMemory) -> list[Path]:
    """Write what was kept and return the files.

    Raises:
        OSError: a file could not be written; the same or RuntimeError from torch.
    """
    writer = DeferringCheckpointEngine()
    for path, content in memory.files:
        writer.save(content, str(path))
    if writer.failure is not None:
        raise writer.failure
    return writer.written


def write_engine_files(engine: Any, staging: Path) -> list[Path]:
    """Have DeepSpeed write its files into the folder `staging`; every rank calls it.

    Returns:
        The files this rank wrote.

    Raises:
        OSError: a file could not be written by this rank; the same or RuntimeError from torch.
    """
    written = _save(engine, staging, DeferringCheckpointEngine())
    if not engine.zero_nvme_offload_optimizer():
        return written
    # As DeepSpeed's save does between two of its barriers, where a full disk would leave the others waiting.
    offloaded = staging / "offloaded_tensors" / f"rank{world()[0]:02d}"
    shutil.copytree(
        engine.optimizer.optimizer_swapper.swap_folder,
        offloaded,
        ignore=lambda _, names: [n for n in names if "gradient" in n],
    )
    return written + [path for path in offloaded.rglob("*") if path.is_file()]


def _save(engine: Any, staging: Path, deferring: DeferringCheckpointEngine) -> list[Path]:
    stock = engine.checkpoint_engine
    engine.checkpoint_engine = deferring
    # Rank 0 would copy conversion scripts beside the checkpoints: not part of one, and a failure before a barrier.
    engine._copy_recovery_script = lambda save_path: None
    engine.zero_nvme_offload_optimizer = lambda: False  # its files are copied afterwards
    try:
        engine.save_checkpoint(str(staging.parent), tag=staging.name, save_latest=False)
    finally:
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer
        engine.checkpoint_engine = stock
    if deferring.failure is not None:
        raise deferring.failure
    return deferring.written
