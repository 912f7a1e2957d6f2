"""The files of DeepSpeed's save: each rank writes its files, or copies them to memory to be written later.

DeepSpeed's saves and loads synchronize all ranks; here one that fails leaves no other waiting.

Source: DeepSpeed 0.19, runtime/engine.py (save_checkpoint, load_checkpoint), runtime/checkpoint_engine and
runtime/zero/stage3.py.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from unimo3.checkpoint.swapped import mapped_states
from unimo3.engine import Engine

_EPILOGUE = "checkpoint_event_epilogue"


@contextmanager
def without_barriers(optimizer: Any) -> Iterator[None]:
    """Within this context, barriers do nothing and persistent parameters stay partitioned.

    Between the barriers of DeepSpeed's save, and before persistent parameters are gathered at the end of a save or a
    load, a rank may fail, and the others would wait for it forever. Here every rank does its part alone. The caller
    synchronizes the ranks afterwards, and only then gathers persistent parameters.
    """
    barrier = comm.barrier
    comm.barrier = lambda *_, **__: None
    if hasattr(optimizer, _EPILOGUE):
        setattr(optimizer, _EPILOGUE, lambda: None)
    try:
        yield
    finally:
        comm.barrier = barrier
        if _EPILOGUE in vars(optimizer):
            delattr(optimizer, _EPILOGUE)


def gather_persistent(optimizer: Any) -> None:
    """Gather persistent parameters again; every rank calls it, whether or not its save or load failed."""
    if hasattr(optimizer, _EPILOGUE):
        getattr(optimizer, _EPILOGUE)()


class FileWriter(TorchCheckpointEngine):
    """DeepSpeed's writer of files.

    Attributes:
        written: this rank's files.

    Args:
        memory: if given, gets a copy of each file's content, and nothing is written.
    """

    def __init__(self, memory: "HostMemory | None" = None) -> None:
        super().__init__()
        self._memory = memory
        self.written: list[Path] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file.

        Raises:
            OSError: it could not be written.
        """
        if self._memory is not None:
            self._memory.keep(Path(path), state_dict)
            return
        # Given a path, torch writes more slowly, and reports a wrong position when the disk is full.
        try:
            with Path(path).open("wb") as file:
                torch.save(state_dict, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        self.written.append(Path(path))


class HostMemory:
    """Copies of what a save would write. The next save uses their tensors again, and so allocates no pages.

    It takes as many bytes as this rank's files have.
    """

    def __init__(self) -> None:
        self.files: list[tuple[Path, Any]] = []
        self._tensors: dict[tuple[str, int], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the cached tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def begin(self) -> None:
        """Forget the files of the save before."""
        self.files = []

    def keep(self, path: Path, content: Any) -> None:
        """Copy what is to be written to `path`."""
        numbers = itertools.count()
        copies: dict[int, Tensor] = {}

        def copy_of(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:  # a tensor that occurs twice is once in the file
                key = (path.name, next(numbers))
                cached = self._tensors.get(key)
                if cached is None or cached.shape != tensor.shape or cached.dtype != tensor.dtype:
                    pinned = tensor.is_cuda
                    cached = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                    self._tensors[key] = cached
                copies[id(tensor)] = cached.copy_(tensor.detach(), non_blocking=True)
            return copies[id(tensor)]

        def walk(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copy_of(value)
            if isinstance(value, dict):
                copied = copy.copy(value)  # of its type, such as OrderedDict
                for key, entry in value.items():
                    copied[key] = walk(entry)
                return copied
            if type(value) in (list, tuple):
                return type(value)(walk(entry) for entry in value)
            return copy.deepcopy(value)

        self.files.append((path, walk(content)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def capture_engine_files(engine: Engine, staging: Path, memory: HostMemory) -> None:
    """Copy to `memory` what DeepSpeed would write into the folder `staging`, within `without_barriers`."""
    memory.begin()
    _save(engine, staging, FileWriter(memory))


def write_captured(memory: HostMemory) -> list[Path]:
    """Write the captured files and return their paths.

    Raises:
        OSError: a file could not be written.
    """
    writer = FileWriter()
    for path, content in memory.files:
        writer.save(content, str(path))
    return writer.written


def write_engine_files(engine: Engine, staging: Path) -> list[Path]:
    """Have DeepSpeed write its files into the folder `staging`, within `without_barriers`.

    Returns:
        The files this rank wrote.

    Raises:
        OSError: a file could not be written by this rank.
    """
    return _save(engine, staging, FileWriter())


def _save(engine: Any, staging: Path, writer: FileWriter) -> list[Path]:  # Any: methods are replaced
    stock = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # Rank 0 would copy conversion scripts next to the checkpoints: not part of one.
    engine._copy_recovery_script = lambda save_path: None
    engine.zero_nvme_offload_optimizer = lambda: False  # it would copy the files that are mapped
    try:
        with mapped_states(engine.optimizer):
            engine.save_checkpoint(str(staging.parent), tag=staging.name, save_latest=False)
    finally:
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer
        engine.checkpoint_engine = stock
    return writer.written
