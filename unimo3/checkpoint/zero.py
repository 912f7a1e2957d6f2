"""Reads a ZeRO checkpoint's tensors one at a time, without running anything from it.

DeepSpeed writes the trained parameters as flat float32 partitions, one file a rank (``*_optim_states.pt``), and their
shapes, the frozen parameters and the buffers in ``*_model_states.pt`` (one a rank in stage 3, else one).

Stage 3: a parameter of n elements takes ceil(n / ranks) elements of every rank's partition, in the order of the
shapes; the last rank's end is padding. Stages 1 and 2: each parameter group is one run of elements, cut among the
ranks wherever the cut falls.

Files are mapped into memory and unpickled by torch's restricted loader with DeepSpeed's own plain classes allowed;
anything else in them is refused.

Source: DeepSpeed 0.19, runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py and utils/zero_to_fp32.py.
"""

import importlib
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


class ZeroCheckpoint:
    """One checkpoint folder, opened.

    Attributes:
        world_size: ranks that wrote it.
        stage: of ZeRO, 1 to 3.

    Args:
        folder: with every rank's files.

    Raises:
        CheckpointError: files are missing, are not ZeRO's, or hold more than plain data.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        partitions, self._models = _open(folder)
        self.world_size = len(partitions)
        try:
            self.stage = int(partitions[0]["zero_stage"])
            key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            self._flat: list[list[Tensor]] = [partition[key] for partition in partitions]
            groups: list[dict[str, torch.Size]] = self._models[0]["param_shapes"]
            self._buffers: list[str] = list(self._models[0]["buffer_names"])
        except KeyError as error:
            raise CheckpointError(
                f"{folder}: has no {error} in its files; was it written by DeepSpeed's ZeRO?"
            ) from error
        counts = partitions[0].get("partition_count", self.world_size)
        if (max(counts) if isinstance(counts, list) else counts) != self.world_size:
            raise CheckpointError(
                f"{folder}: was written by {counts} ranks, files of {self.world_size} are here; copy it whole"
            )
        self._frozen: dict[str, torch.Size] = self._models[0].get("frozen_param_shapes") or {}
        self._trained = {name: shape for group in groups for name, shape in group.items()}
        self._places = self._stage3_places(groups) if self.stage == 3 else self._stage2_places(groups, partitions[0])

    @property
    def tied(self) -> dict[str, str]:
        """Other names of parameters that stand in the checkpoint once."""
        return dict(self._models[0].get("shared_params") or {})

    def names(self) -> list[str]:
        """Trained parameters, then frozen ones, then buffers."""
        return [*self._trained, *self._frozen, *self._buffers]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        if name in self._trained:
            return self._trained[name]
        return self._frozen[name] if name in self._frozen else self._models[0]["module"][name].shape

    def tensor(self, name: str) -> Tensor:
        """Assemble one tensor: float32 for trained parameters, else as stored."""
        if name in self._trained:
            shape = self._trained[name]
            group, start = self._places[name]
            if self.stage == 3:
                size = math.ceil(shape.numel() / self.world_size)
                parts = [part for rank in self._flat for part in _run_of(rank, start, size)]
            else:
                parts = list(_run_of([rank[group] for rank in self._flat], start, shape.numel()))
            return torch.cat([part.detach() for part in parts])[: shape.numel()].view(shape)
        if name in self._frozen:
            # Stage 3 cuts frozen parameters too; the other stages keep them whole.
            fragments = [model["frozen_param_fragments"][name].detach().view(-1) for model in self._models]
            return torch.cat(fragments)[: self._frozen[name].numel()].view(self._frozen[name])
        buffer: Tensor = self._models[0]["module"][name]
        return buffer

    def _stage3_places(self, groups: list[dict[str, torch.Size]]) -> dict[str, tuple[int, int]]:
        places = {}
        start = 0
        for number, group in enumerate(groups):
            for name, shape in group.items():
                places[name] = (number, start)
                start += math.ceil(shape.numel() / self.world_size)
        held = {sum(flat.numel() for flat in rank) for rank in self._flat}
        if held != {start}:
            raise CheckpointError(
                f"{self.folder}: its shapes need {start} elements of every rank, the ranks hold {sorted(held)} "
                "(values offloaded to NVMe are not in these files)"
            )
        return places

    def _stage2_places(
        self, groups: list[dict[str, torch.Size]], partition: dict[str, Any]
    ) -> dict[str, tuple[int, int]]:
        places = {}
        paddings = partition.get("param_alignment_paddings")
        for number, group in enumerate(groups):
            start = 0
            for index, (name, shape) in enumerate(group.items()):
                places[name] = (number, start)
                start += shape.numel()
                end = start
                start += paddings[number][index] if paddings else 0
            held = sum(rank[number].numel() for rank in self._flat)
            if end > held:
                raise CheckpointError(f"{self.folder}: group {number} needs {end} elements, its ranks hold {held}")
        return places


def _run_of(pieces: list[Tensor], start: int, size: int) -> Iterator[Tensor]:
    """Elements [start, start + size) of the concatenated pieces."""
    for piece in pieces:
        if size and start < piece.numel():
            taken = piece[start : start + size]
            yield taken
            size -= taken.numel()
            start = 0
        else:
            start = max(0, start - piece.numel())


def _open(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every rank's optimizer state and the model states, in the order of ranks."""
    optims = _ranked(folder, "*zero_pp_rank_*_optim_states.pt")
    models = _ranked(folder, "zero_pp_rank_*_model_states.pt") or sorted(folder.glob("mp_rank_00_model_states.pt"))
    if not optims or len(models) not in (1, len(optims)):
        raise CheckpointError(
            f"{folder}: holds {len(optims)} optimizer files and {len(models)} model files of ZeRO; one optimizer file "
            "a rank and one model file (stage 3: one a rank) are needed"
        )
    try:
        return [_load(path)["optimizer_state_dict"] for path in optims], [_load(path) for path in models]
    except KeyError as error:
        raise CheckpointError(f"{optims[0]}: has no {error}; was it written by DeepSpeed's ZeRO?") from error


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
    allowed = []
    for module, names in _ALLOWED_GLOBALS.items():
        loaded = importlib.import_module(module)
        allowed += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return allowed
