"""Reads a ZeRO checkpoint's tensors one at a time, or pieces of them, without running anything from it.

DeepSpeed writes the trained parameters as flat float32 partitions and so the optimizer's moments, one file a rank
(``*_optim_states.pt``), and their shapes, the frozen parameters and the buffers in ``*_model_states.pt`` (one a rank in
stage 3, else one).

Stage 3: a parameter of n elements takes ceil(n / ranks) elements of every rank's partition, in the order of the
shapes; the last rank's end is padding. Stages 1 and 2: each parameter group is one run of elements, cut among the
ranks wherever the cut falls.

Source: DeepSpeed 0.19, runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py and utils/zero_to_fp32.py.
"""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimo3.checkpoint.torch_file import StoredTensor, load_structure
from unimo3.distributed import from_first_rank, on_all_ranks, world
from unimo3.errors import CheckpointError

# Name of the float32 weights among a parameter's values; the others are the optimizer's, such as ``exp_avg``.
WEIGHTS = "fp32"
VERIFY = "verify the checkpoint"


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
        over_ranks: every rank calls it. Rank 0 lists the folder and reads what all files have alike, each rank reads
            the structure of a part of the files, and all get the rest from the ranks that read it. At hundreds of
            ranks, reading all files on each of them would take minutes.

    Raises:
        CheckpointError: files are missing, are not ZeRO's, or contain more than plain data; on every rank.
    """

    def __init__(self, folder: Path, over_ranks: bool = False):
        self.folder = folder
        files, self.optimizer, self.model = _once(lambda: _first_files(folder), folder, over_ranks)
        self.world_size = len(files)
        try:
            self.stage = int(self.optimizer["zero_stage"])
            groups: list[dict[str, torch.Size]] = self.model["param_shapes"]
            self._buffers: list[str] = list(self.model["buffer_names"])
            parts = _parts(files, folder, over_ranks)
        except KeyError as error:
            raise CheckpointError(
                f"{folder}: has no {error} in its files; was it written by DeepSpeed's ZeRO?"
            ) from error
        num_models = sum(model is not None for _, model in files)
        if self.stage == 3 and num_models != self.world_size:
            raise CheckpointError(
                f"{folder}: ZeRO-3 writes a model file a rank, {num_models} of {self.world_size} are here; copy all "
                "its files"
            )
        counts = self.optimizer.get("partition_count", self.world_size)
        if (max(counts) if isinstance(counts, list) else counts) != self.world_size:
            raise CheckpointError(
                f"{folder}: was written by {counts} ranks, files of {self.world_size} are here; copy all its files"
            )
        self.moments = [name for name in parts[0].pieces if name != WEIGHTS]
        # By kind of value and rank: the partition's pieces, a sub-group or a group each.
        self._pieces = {kind: [_pieces_of(part, kind, folder) for part in parts] for kind in (WEIGHTS, *self.moments)}
        self._frozen_pieces_of_ranks = [part.frozen for part in parts[:num_models]]
        self._frozen: dict[str, torch.Size] = dict(self.model.get("frozen_param_shapes") or {})
        self.groups = [list(group) for group in groups]
        self._trained = {name: shape for group in groups for name, shape in group.items()}
        if self.stage < 3:
            # Stage 1 lists no frozen parameters; they are complete among the module's values.
            known = {*self._trained, *self._frozen, *self._buffers, *self.tied}
            self._frozen |= {name: value.shape for name, value in self.model["module"].items() if name not in known}
        self._offsets = self._zero3_offsets(groups) if self.stage == 3 else self._zero2_offsets(groups, self.optimizer)

    def base_state(self) -> dict[str, Any]:
        """The wrapped optimizer's ``state`` and ``param_groups``."""
        return _base_state(self.optimizer)

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
            return [frozen[name] for frozen in self._frozen_pieces_of_ranks]
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


class _RankPart(NamedTuple):
    """What one rank's files have of their own.

    Attributes:
        pieces: by kind of value, weights first: its partition's, a sub-group or a group each.
        frozen: its parts of frozen parameters.
    """

    pieces: dict[str, list[StoredTensor]]
    frozen: dict[str, StoredTensor]


RankFiles = tuple[Path, Path | None]
"""A rank's optimizer file, and its model file if it has one."""


def _files(folder: Path) -> list[RankFiles]:
    """The files of every rank, in the order of ranks."""
    optims = _ranked(folder, "*zero_pp_rank_*_optim_states.pt")
    models = _ranked(folder, "zero_pp_rank_*_model_states.pt") or sorted(folder.glob("mp_rank_00_model_states.pt"))
    if not optims or len(models) not in (1, len(optims)):
        raise CheckpointError(
            f"{folder}: has {len(optims)} optimizer files and {len(models)} model files of ZeRO; one optimizer file "
            "a rank and one model file (stage 3: one a rank) are needed"
        )
    return list(itertools.zip_longest(optims, models))


def _first_files(folder: Path) -> tuple[list[RankFiles], dict[str, Any], dict[str, Any]]:
    """The files of every rank, and what the first rank's two contain, which has what those of all ranks have alike."""
    files = _files(folder)
    optim, model = files[0]
    assert model is not None, "_files gives the first rank's"
    return files, _optimizer_state(optim), load_structure(model)


def _once(read: Callable[[], Any], folder: Path, over_ranks: bool) -> Any:
    """What `read` returns, read by rank 0 for all ranks."""
    return from_first_rank(f"reading {folder}", read, VERIFY) if over_ranks else read()


def _parts(files: list[RankFiles], folder: Path, over_ranks: bool) -> list[_RankPart]:
    """The parts of all ranks that wrote the files, in their order."""
    if not over_ranks:
        return [_part(*pair) for pair in files]
    rank, size = world()
    last = size - 1  # from the last rank on: rank 0 has read more already
    read_by = on_all_ranks(f"reading {folder}", lambda: [_part(*pair) for pair in files[last - rank :: size]], VERIFY)
    return [read_by[last - number % size][number // size] for number in range(len(files))]


def _part(optim: Path, model: Path | None) -> _RankPart:
    saved = _optimizer_state(optim)
    key = "fp32_flat_groups" if int(saved["zero_stage"]) == 3 else "single_partition_of_fp32_groups"
    pieces = {WEIGHTS: list(saved[key])}
    state = _base_state(saved)["state"]
    for number in sorted(state):
        for name, value in state[number].items():
            if isinstance(value, StoredTensor) and value.shape:
                pieces.setdefault(name, []).append(value)
    frozen = load_structure(model).get("frozen_param_fragments") if model is not None else None
    return _RankPart(pieces, dict(frozen or {}))


def _pieces_of(part: _RankPart, kind: str, folder: Path) -> list[StoredTensor]:
    if kind not in part.pieces:
        raise CheckpointError(f"{folder}: not every rank's file has '{kind}'; copy the complete checkpoint")
    return part.pieces[kind]


def _optimizer_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = load_structure(path)["optimizer_state_dict"]
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}; was it written by DeepSpeed's ZeRO?") from error
    return state


def _base_state(saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = saved["optimizer_state_dict" if int(saved["zero_stage"]) == 3 else "base_optimizer_state"]
    return state


def _ranked(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern in the order of their ranks."""
    return sorted(folder.glob(pattern), key=lambda path: int(re.findall(r"zero_pp_rank_(\d+)_", path.name)[0]))
