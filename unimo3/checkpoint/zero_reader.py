"""Reads a ZeRO checkpoint's tensors one at a time, or pieces of them, without running anything from it.

DeepSpeed writes the trained parameters as flat float32 partitions and so the optimizer's moments, one file a rank
(``*_optim_states.pt``), and their shapes, the frozen parameters and the buffers in ``*_model_states.pt`` (one a rank in
stage 3, else one).

Stage 3: a parameter of n elements takes ceil(n / ranks) elements of every rank's partition, in the order of the
shapes; the last rank's end is padding. Stages 1 and 2: each parameter group is one run of elements, cut among the
ranks wherever the cut falls.

Source: DeepSpeed 0.19, runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py and utils/zero_to_fp32.py.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimo3.checkpoint.torch_file import StoredTensor, load_structure
from unimo3.errors import CheckpointError

# Name of the float32 weights among a parameter's values; the others are the optimizer's, such as ``exp_avg``.
WEIGHTS = "fp32"


class ZeroCheckpoint:
    """One checkpoint folder, opened.

    Attributes:
        world_size: ranks that wrote it.
        stage: of ZeRO, 1 to 3.
        moments: names of the optimizer's values of each element, such as ``exp_avg``.
        optimizer: of rank 0, as DeepSpeed wrote it.
        model: of rank 0, the same.

    Args:
        folder: with every rank's files.

    Raises:
        CheckpointError: files are missing, are not ZeRO's, or contain more than plain data.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        partitions, self._models = _open(folder)
        self.world_size = len(partitions)
        self.optimizer, self.model = partitions[0], self._models[0]
        try:
            self.stage = int(self.optimizer["zero_stage"])
            key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            # By kind of value and rank: the partition's pieces, a sub-group or a group each.
            self._pieces: dict[str, list[list[StoredTensor]]] = {WEIGHTS: [partition[key] for partition in partitions]}
            groups: list[dict[str, torch.Size]] = self.model["param_shapes"]
            self._buffers: list[str] = list(self.model["buffer_names"])
            states = [self.base_state(partition)["state"] for partition in partitions]
        except KeyError as error:
            raise CheckpointError(
                f"{folder}: has no {error} in its files; was it written by DeepSpeed's ZeRO?"
            ) from error
        if self.stage == 3 and len(self._models) != self.world_size:
            raise CheckpointError(
                f"{folder}: ZeRO-3 writes a model file a rank, {len(self._models)} of {self.world_size} are here; copy "
                "all its files"
            )
        counts = self.optimizer.get("partition_count", self.world_size)
        if (max(counts) if isinstance(counts, list) else counts) != self.world_size:
            raise CheckpointError(
                f"{folder}: was written by {counts} ranks, files of {self.world_size} are here; copy all its files"
            )
        first: dict[str, Any] = next(iter(states[0].values()), {})
        self.moments = [name for name, value in first.items() if isinstance(value, StoredTensor) and value.shape]
        for name in self.moments:
            self._pieces[name] = [[state[number][name] for number in sorted(state)] for state in states]
        self._frozen: dict[str, torch.Size] = dict(self.model.get("frozen_param_shapes") or {})
        self.groups = [list(group) for group in groups]
        self._trained = {name: shape for group in groups for name, shape in group.items()}
        if self.stage < 3:
            # Stage 1 lists no frozen parameters; they are complete among the module's values.
            known = {*self._trained, *self._frozen, *self._buffers, *self.tied}
            self._frozen |= {name: value.shape for name, value in self.model["module"].items() if name not in known}
        self._offsets = self._zero3_offsets(groups) if self.stage == 3 else self._zero2_offsets(groups, self.optimizer)

    def base_state(self, partition: dict[str, Any] | None = None) -> dict[str, Any]:
        """The wrapped optimizer's ``state`` and ``param_groups``."""
        saved = partition if partition is not None else self.optimizer
        state: dict[str, Any] = saved["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return state

    @property
    def tied(self) -> dict[str, str]:
        """Other names of tied parameters, which are saved once."""
        return dict(self.model.get("shared_params") or {})

    @property
    def trained(self) -> dict[str, torch.Size]:
        """Shapes of the trained parameters."""
        return self._trained

    @property
    def frozen(self) -> dict[str, torch.Size]:
        """Shapes of the frozen parameters."""
        return self._frozen

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        return self._buffers

    def names(self) -> list[str]:
        """Trained parameters, then frozen ones, then buffers."""
        return [*self._trained, *self._frozen, *self._buffers]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        if name in self._trained:
            return self._trained[name]
        return self._frozen[name] if name in self._frozen else self.model["module"][name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, as `tensor` and `fragment` give it."""
        if name in self._trained:
            return torch.float32
        if name in self._frozen:
            return self._frozen_pieces(name)[0].dtype
        buffer: StoredTensor = self.model["module"][name]
        return buffer.dtype

    def tensor(self, name: str) -> Tensor:
        """Assemble one tensor: float32 for trained parameters, else as stored."""
        if name in self._trained or name in self._frozen:
            shape = self.shape(name)
            return self.fragment(name, 0, shape.numel()).view(shape)
        stored: StoredTensor = self.model["module"][name]
        return stored.read()

    def fragment(self, name: str, first: int, count: int, kind: str = WEIGHTS) -> Tensor:
        """Elements [first, first + count) of a parameter.

        Args:
            kind: its weights, or one of `moments` of a trained parameter.

        Returns:
            [count], float32 for trained parameters, else as stored.
        """
        target = torch.empty(count, dtype=self.dtype(name) if name in self._frozen else torch.float32)
        self.read_fragment(target, name, first, kind)
        return target

    def read_fragment(self, target: Tensor, name: str, first: int, kind: str = WEIGHTS) -> None:
        """Fill a tensor of the type that `fragment` gives with a parameter's elements from `first` on."""
        if name in self._frozen:
            # Stage 3 cuts frozen parameters too; the other stages save them complete.
            _fill(target, self._frozen_pieces(name), first)
            return
        group, start = self._offsets[name]
        ranks = self._pieces[kind]
        if self.stage != 3:
            _fill(target, [rank[group] for rank in ranks], start + first)
            return
        # A rank's part of the parameter is one run of its partition.
        part = math.ceil(self._trained[name].numel() / self.world_size)
        done = 0
        while done < target.numel():
            rank, offset = divmod(first + done, part)
            size = min(part - offset, target.numel() - done)
            _fill(target[done : done + size], ranks[rank], start + offset)
            done += size

    def _frozen_pieces(self, name: str) -> list[StoredTensor]:
        if name in (self.model.get("frozen_param_fragments") or {}):
            return [model["frozen_param_fragments"][name] for model in self._models]
        return [self.model["module"][name]]

    def _zero3_offsets(self, groups: list[dict[str, torch.Size]]) -> dict[str, tuple[int, int]]:
        offsets = {}
        start = 0
        for number, group in enumerate(groups):
            for name, shape in group.items():
                offsets[name] = (number, start)
                start += math.ceil(shape.numel() / self.world_size)
        sizes = {sum(piece.numel() for piece in rank) for ranks in self._pieces.values() for rank in ranks}
        if sizes != {start}:
            raise CheckpointError(
                f"{self.folder}: its shapes need {start} elements of every rank, the ranks have {sorted(sizes)} "
                "(values offloaded to NVMe are not in these files)"
            )
        return offsets

    def _zero2_offsets(
        self, groups: list[dict[str, torch.Size]], partition: dict[str, Any]
    ) -> dict[str, tuple[int, int]]:
        offsets = {}
        paddings = partition.get("param_alignment_paddings")
        for number, group in enumerate(groups):
            start = 0
            for index, (name, shape) in enumerate(group.items()):
                offsets[name] = (number, start)
                start += shape.numel()
                end = start
                start += paddings[number][index] if paddings else 0
            available = min(sum(rank[number].numel() for rank in ranks) for ranks in self._pieces.values())
            if end > available:
                raise CheckpointError(f"{self.folder}: group {number} needs {end} elements, its ranks have {available}")
        return offsets


def _fill(target: Tensor, pieces: list[StoredTensor], first: int) -> None:
    """Fill `target` with the elements from `first` on of the concatenated pieces."""
    done = 0
    for piece in pieces:
        if first >= piece.numel():
            first -= piece.numel()
            continue
        size = min(piece.numel() - first, target.numel() - done)
        piece.read_into(target[done : done + size], first)
        done, first = done + size, 0
        if done == target.numel():
            return
    if done < target.numel():
        raise CheckpointError(
            f"{pieces[0].path.parent}: {target.numel() - done} elements of a parameter are in no rank's file; copy the "
            "complete checkpoint"
        )


def _open(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every rank's optimizer state and the model states, in the order of ranks."""
    optims = _ranked(folder, "*zero_pp_rank_*_optim_states.pt")
    models = _ranked(folder, "zero_pp_rank_*_model_states.pt") or sorted(folder.glob("mp_rank_00_model_states.pt"))
    if not optims or len(models) not in (1, len(optims)):
        raise CheckpointError(
            f"{folder}: has {len(optims)} optimizer files and {len(models)} model files of ZeRO; one optimizer file "
            "a rank and one model file (stage 3: one a rank) are needed"
        )
    try:
        return (
            [load_structure(path)["optimizer_state_dict"] for path in optims],
            [load_structure(path) for path in models],
        )
    except KeyError as error:
        raise CheckpointError(f"{optims[0]}: has no {error}; was it written by DeepSpeed's ZeRO?") from error


def _ranked(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern in the order of their ranks."""
    return sorted(folder.glob(pattern), key=lambda path: int(re.findall(r"zero_pp_rank_(\d+)_", path.name)[0]))
