"""Optimizer states that DeepSpeed keeps in files on NVMe, as tensors that read and write these files.

So a save writes the same files as with states in memory, and needs no memory for them; and a load fills the files.
DeepSpeed's own load of its copies continues with other losses, and no error: it restores neither moments nor pieces
that are too small for a file.

Source: DeepSpeed 0.19, runtime/swap_tensor/optimizer_utils.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def mapped_states(optimizer: Any, moments: Sequence[str] = ()) -> Iterator[None]:
    """Within this context, states on NVMe are tensors over their files. Between optimizer steps; no collective.

    Args:
        moments: names of states to be made where an optimizer has none yet; their values are undefined.
    """
    if not getattr(optimizer, "swap_optimizer", False):
        yield
        return
    swapper = optimizer.optimizer_swapper
    infos = swapper.swap_params_info
    for flat in optimizer.fp32_partitioned_groups_flat:
        if flat.ds_id not in infos:
            continue  # too small for a file
        info = infos[flat.ds_id]
        for context in info.tensors:
            context.compute_tensor.data = _mapped(context.swap_path, info.numel(), info.dtype())
        state = optimizer.optimizer.state
        for name in () if info.has_state_tensors else moments:
            path = Path(info.swap_folder, f"{name}-{flat.ds_id}.tensor.swp")
            with path.open("ab") as file:
                file.truncate(swapper._io_aligned_numel(info.numel()) * info.dtype().itemsize)
            state[flat][name] = _mapped(str(path), info.numel(), info.dtype())
        swapper._update_param_state_info(info, flat)  # finds these, and gives them the same paths
    try:
        yield
    finally:
        for info in infos.values():
            info.release_memory()


def _mapped(path: str, count: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=count, dtype=dtype)
