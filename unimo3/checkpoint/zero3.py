"""Reads a ZeRO-3 checkpoint's tensors one at a time, without running anything from it.

DeepSpeed writes two files a rank: ``*_model_states.pt`` (shapes, buffers, frozen parameters' partitions) and
``*_optim_states.pt`` (each rank's flat float32 partition of all trained parameters, in the order of the shapes). A
parameter of n elements takes ceil(n / ranks) elements of every rank's partition; the last rank's end is padding.

Files are mapped into memory and unpickled by torch's restricted loader with DeepSpeed's own plain classes allowed;
anything else in them is refused.

Source: DeepSpeed 0.19, runtime/zero/stage3.py and utils/zero_to_fp32.py.
"""

import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimo3.errors import CheckpointError

_ALLOWED_GLOBALS = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


class Zero3Checkpoint:
    """One checkpoint folder, opened.

    Args:
        folder: with every rank's files.

    Raises:
        CheckpointError: files are missing, are not ZeRO-3's, or hold more than plain data.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        states = _ranked(folder, "*zero_pp_rank_*_model_states.pt")
        optims = _ranked(folder, "*zero_pp_rank_*_optim_states.pt")
        if not states or len(states) != len(optims):
            raise CheckpointError(
                f"{folder}: holds {len(states)} model and {len(optims)} optimizer files of ZeRO-3; one of each a rank "
                "is needed (checkpoints of ZeRO-2 cannot be exported yet)"
            )
        self._models = [_load(path) for path in states]
        partitions = [_load(path)["optimizer_state_dict"] for path in optims]
        stage = int(partitions[0].get("zero_stage", 0))
        count = partitions[0].get("partition_count")
        if stage != 3 or count != len(optims):
            raise CheckpointError(
                f"{folder}: is of ZeRO stage {stage} over {count} ranks with {len(optims)} files; stage 3 is needed"
            )
        self._flat: list[list[Tensor]] = [partition["fp32_flat_groups"] for partition in partitions]
        self.world_size = len(optims)
        self.shapes: dict[str, torch.Size] = {
            name: shape for group in self._models[0]["param_shapes"] for name, shape in group.items()
        }
        self._offsets: dict[str, int] = {}
        offset = 0
        for name, shape in self.shapes.items():
            self._offsets[name] = offset
            offset += math.ceil(shape.numel() / self.world_size)
        held = sum(flat.numel() for flat in self._flat[0])
        if offset > held:
            raise CheckpointError(f"{folder}: its partitions hold {held} elements a rank, its shapes need {offset}")

    @property
    def tied(self) -> dict[str, str]:
        """Other names of parameters that stand in the checkpoint once."""
        return dict(self._models[0].get("shared_params") or {})

    def names(self) -> list[str]:
        """Trained parameters, then frozen ones, then buffers."""
        frozen = self._models[0].get("frozen_param_shapes") or {}
        return [*self.shapes, *frozen, *self._models[0]["buffer_names"]]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        if name in self.shapes:
            return self.shapes[name]
        frozen = self._models[0].get("frozen_param_shapes") or {}
        return frozen[name] if name in frozen else self._models[0]["module"][name].shape

    def tensor(self, name: str) -> Tensor:
        """Assemble one tensor: float32 for trained parameters, else as stored."""
        if name in self.shapes:
            shape = self.shapes[name]
            size = math.ceil(shape.numel() / self.world_size)
            parts = [part for rank in self._flat for part in _slice_of_groups(rank, self._offsets[name], size)]
            return torch.cat(parts)[: shape.numel()].view(shape).detach()
        frozen = self._models[0].get("frozen_param_shapes") or {}
        if name in frozen:
            fragments = [model["frozen_param_fragments"][name] for model in self._models]
            return torch.cat(fragments)[: frozen[name].numel()].view(frozen[name]).detach()
        return self._models[0]["module"][name]


def _slice_of_groups(groups: list[Tensor], start: int, size: int) -> Iterator[Tensor]:
    """Elements [start, start + size) of the concatenated groups."""
    for group in groups:
        if size and start < group.numel():
            taken = group[start : start + size]
            yield taken
            size -= taken.numel()
            start = 0
        else:
            start = max(0, start - group.numel())


def _ranked(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern in the order of their ranks."""
    return sorted(folder.glob(pattern), key=lambda path: int(re.findall(r"zero_pp_rank_(\d+)_", path.name)[0]))


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_allowed_classes()):
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: holds more than tensors and plain data, refused: {reason}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); verify the checkpoint") from error
    return loaded


def _allowed_classes() -> list[Any]:
    import importlib

    allowed = []
    for module, names in _ALLOWED_GLOBALS.items():
        loaded = importlib.import_module(module)
        allowed += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return allowed
