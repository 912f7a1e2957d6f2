"""The folder on NVMe into which DeepSpeed moves the optimizer's states of one run.

Source: DeepSpeed 0.19, runtime/swap_tensor and op_builder/async_io.py.
"""

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

from unimo3.distributed import all_gather_object
from unimo3.errors import ConfigError
from unimo3.training.ds_config import offloads_to_nvme


def swap_folder(nvme_path: str, run: Path) -> str:
    """The folder of a run's states; empty if `nvme_path` is. Two runs on a node would overwrite each other's files."""
    digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
    return str(Path(nvme_path).resolve() / f"{run.name}-{digest}") if nvme_path else ""


def prepare_swap_folder(ds_config: dict[str, Any]) -> None:
    """Make the folder where a ds_config needs it; every rank calls it, for its own node.

    Raises:
        ConfigError: on every rank; on the node of one the folder cannot be made, or DeepSpeed's ``async_io`` cannot be
            built.
    """
    if not offloads_to_nvme(ds_config):
        return
    folder = Path(ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"])
    errors = [error for error in all_gather_object(_swap_error(folder)) if error]
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))


def _swap_error(folder: Path) -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    where = f"training.nvme_path: '{folder.parent}'"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        return f"{where}: no folder can be made there on {socket.gethostname()} ({error.strerror}); name another"
    if not os.access(folder, os.W_OK):
        return f"{where}: {folder.name} cannot be written on {socket.gethostname()}; remove it, or name another folder"
    if not AsyncIOBuilder().is_compatible():
        return (
            f"training.ds_config: DeepSpeed's async_io, which reads and writes NVMe, cannot be built on "
            f"{socket.gethostname()}; install libaio-dev (libaio-devel) and a C++ compiler, or use "
            "zero3_offload_cpu.json"
        )
    return ""
