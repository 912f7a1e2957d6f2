"""Sharded ZeRO-3 checkpoint -> safetensors weights that ``from_pretrained`` loads.

Tensors are assembled one at a time and written in files of bounded size, so memory is bounded by one output file.
Values that the target type cannot hold are an error that names the tensor, unless the caller chooses otherwise.

Source: the safetensors format and transformers' index of sharded files.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from unimo3.checkpoint.zero3 import Zero3Checkpoint
from unimo3.errors import CheckpointError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# An engine trains a task whose `model` attribute is what users load.
_PREFIX = "model."

OnOverflow = Literal["error", "clamp", "keep-fp32"]


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor; `num_over_range` and `num_flushed` count values of the source."""

    name: str
    shape: list[int]
    dtype: str
    largest: float
    num_over_range: int
    num_flushed: int
    sha256: str


def export_weights(
    checkpoint: Path, out: Path, dtype: str, on_overflow: OnOverflow, max_file_bytes: int
) -> list[TensorReport]:
    """Write a checkpoint's weights into the folder `out`.

    Args:
        dtype: of floating-point tensors: a key of `DTYPES`.
        on_overflow: what to do with values beyond fp16's 65504: refuse, clamp, or keep that tensor in float32.
        max_file_bytes: size a file is kept below, unless one tensor is larger.

    Raises:
        CheckpointError: a tensor holds values that are not finite, or that the target type cannot hold.
    """
    source = Zero3Checkpoint(checkpoint)
    target = DTYPES[dtype]
    reports: list[TensorReport] = []
    placed: dict[str, str] = {}
    names = list(_files(source, target, max_file_bytes))
    total = 0
    for number, group in enumerate(names):
        file = "model.safetensors" if len(names) == 1 else f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        tensors = {}
        for name in group:
            tensor, report = _convert(name, source.tensor(name), target, on_overflow)
            tensors[report.name] = tensor
            reports.append(report)
            placed[report.name] = file
            total += tensor.numel() * tensor.element_size()
        save_file(tensors, out / file, metadata={"format": "pt"})
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (out / "export_report.json").write_text(
        json.dumps({"checkpoint": checkpoint.name, "dtype": dtype, "tensors": [asdict(r) for r in reports]}, indent=1)
    )
    return reports


def copy_model_files(model_files: Path, out: Path, dtype: str) -> None:
    """Copy configuration, tokenizer and image processor, and enter the weights' type in ``config.json``.

    Raises:
        CheckpointError: the run has no such folder.
    """
    if not (model_files / "config.json").is_file():
        raise CheckpointError(f"{model_files}: has no config.json; is this the folder of a run?")
    for path in sorted(model_files.iterdir()):
        shutil.copyfile(path, out / path.name)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _files(source: Zero3Checkpoint, target: torch.dtype, max_file_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each output file."""
    group: list[str] = []
    held = 0
    for name in source.names():
        size = source.shape(name).numel() * target.itemsize
        if group and held + size > max_file_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _convert(name: str, tensor: Tensor, target: torch.dtype, on_overflow: OnOverflow) -> tuple[Tensor, TensorReport]:
    public = name.removeprefix(_PREFIX)
    largest, over, flushed = 0.0, 0, 0
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{public}: holds values that are not finite; export an earlier checkpoint with --tag"
            )
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        limit = torch.finfo(target).max
        over = int((tensor.abs() > limit).sum())
        if over and on_overflow == "error":
            raise CheckpointError(
                f"{public}: {over} values up to {largest:.6g} exceed {limit:.6g}; use --dtype bf16, or --on-overflow "
                "clamp or keep-fp32"
            )
        if over and on_overflow == "keep-fp32":
            target = torch.float32
        converted = tensor.clamp(-limit, limit).to(target) if over and on_overflow == "clamp" else tensor.to(target)
        flushed = int(((converted == 0) & (tensor != 0)).sum())
    else:
        converted = tensor
    converted = converted.contiguous()
    digest = hashlib.sha256(converted.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    kind = str(converted.dtype).removeprefix("torch.")
    return converted, TensorReport(public, list(tensor.shape), kind, largest, over, flushed, digest)
