"""DeepSpeed's save, made to end on every rank: what fails on one is raised after all have met again.

DeepSpeed's save has barriers of its own. A rank that raised before one would leave the others waiting there for ever,
so failures to write are kept until the save is over.

Source: DeepSpeed 0.19, runtime/engine.py (save_checkpoint) and runtime/checkpoint_engine.
"""

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from unimo3.distributed import world


class DeferringCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's writer of files.

    Attributes:
        written: this rank's files.
        failure: the first error a write met.
    """

    def __init__(self) -> None:
        super().__init__()
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
            super().save(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or error


def write_engine_files(engine: Any, staging: Path) -> list[Path]:
    """Have DeepSpeed write its files into the folder `staging`; every rank calls it.

    Returns:
        The files this rank wrote.

    Raises:
        OSError: a file could not be written by this rank; the same or RuntimeError from torch.
    """
    stock = engine.checkpoint_engine
    deferring = DeferringCheckpointEngine()
    engine.checkpoint_engine = deferring
    # Rank 0 would copy conversion scripts beside the checkpoints: not part of one, and a failure before a barrier.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(staging.parent), tag=staging.name, save_latest=False)
    finally:
        del engine._copy_recovery_script
        engine.checkpoint_engine = stock
    if deferring.failure is not None:
        raise deferring.failure
    # With the optimizer on NVMe, DeepSpeed copies this rank's part of it.
    offloaded = staging / "offloaded_tensors" / f"rank{world()[0]:02d}"
    return deferring.written + [path for path in offloaded.rglob("*") if path.is_file()]
