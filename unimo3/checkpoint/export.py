"""Sharded ZeRO checkpoint -> safetensors weights that ``from_pretrained`` loads.

    OUT/model.safetensors            or model-00001-of-00003.safetensors ... and model.safetensors.index.json
    OUT/export_report.json           what became of each tensor
    OUT/config.json, tokenizer, ...  the files of RUN/model, answers.json among them in VQA

Tensors are assembled one at a time and written in files of bounded size, so memory is bounded by one output file.
Values that the target type cannot hold are an error that names the tensors, unless the caller chooses otherwise. Tied
weights are written once; the model ties them again when it loads.

Source: the safetensors format and transformers' index of sharded files.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from unimo3.checkpoint.manifest import flush_folder, make_readable
from unimo3.checkpoint.zero import ZeroCheckpoint
from unimo3.errors import CheckpointError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# An engine trains a task whose `model` attribute is what users load.
_PREFIX = "model."
_NUM_FAULTS_SHOWN = 10

OnOverflow = Literal["error", "clamp", "keep-fp32"]


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: as users see it.
        dtype: as written.
        largest: magnitude in the source.
        num_over_range: values of the source beyond the target type's largest.
        num_flushed: values that became zero.
        sha256: of the bytes as written.
    """

    name: str
    shape: list[int]
    dtype: str
    largest: float
    num_over_range: int
    num_flushed: int
    sha256: str


def export_run(
    run: Path, checkpoint: Path, out: Path, dtype: str, on_overflow: OnOverflow, max_file_bytes: int
) -> list[TensorReport]:
    """Write the folder `out`, whole or not at all: it appears by a rename when everything is in it.

    Args:
        run: gives the model's configuration, tokenizer and image processor.
        checkpoint: a verified one.
        out: must not exist, or be empty.
        dtype: see `export_weights`; so for `on_overflow` and `max_file_bytes`.

    Raises:
        CheckpointError: see `export_weights` and `copy_model_files`.
    """
    out = out.resolve()
    staging = out.with_name(out.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        copy_model_files(run, staging)
        reports = export_weights(checkpoint, staging, dtype, on_overflow, max_file_bytes)
        # Weights kept in float32 would overflow again if from_pretrained cast them to the half type.
        kept = any(report.num_over_range and report.dtype == "float32" for report in reports)
        _set_config_dtype(staging / "config.json", torch.float32 if kept else DTYPES[dtype])
        _flush(staging)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging)
        raise
    flush_folder(out.parent)
    return reports


def export_weights(
    checkpoint: Path, out: Path, dtype: str, on_overflow: OnOverflow, max_file_bytes: int
) -> list[TensorReport]:
    """Write a checkpoint's weights and their report into the folder `out`.

    Args:
        dtype: of floating-point tensors: a key of `DTYPES`.
        on_overflow: what to do with values beyond the type's largest (fp16: 65504): refuse, clamp, or keep that
            tensor in float32.
        max_file_bytes: size a file is kept below, unless one tensor is larger.

    Raises:
        CheckpointError: tensors hold values that are not finite, or that the target type cannot hold.
    """
    source = ZeroCheckpoint(checkpoint)
    reports: list[TensorReport] = []
    faults: list[str] = []
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        if held and not faults:
            save_file(held, out / f"part_{len(files)}", metadata={"format": "pt"})
            files.append(list(held))
        held.clear()

    for name in tqdm(source.names(), desc="export", unit="tensor", disable=None if sys.stderr.isatty() else True):
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{checkpoint}: {name}: is not part of the model (no '{_PREFIX}' before it); was this run made by "
                "python -m pretrain.train?"
            )
        public = name.removeprefix(_PREFIX)
        stored = source.tensor(name)
        converted, report, fault = _convert(public, stored, DTYPES[dtype], on_overflow)
        if fault:
            faults.append(fault)
        if held and _num_bytes(converted) + sum(map(_num_bytes, held.values())) > max_file_bytes:
            write()
        # A tensor that needed no conversion may still be the mapped file, or lie there twice: copied then.
        held[public] = converted.clone() if converted is stored else converted
        reports.append(report)
    write()
    if faults:
        more = f"\n  and {len(faults) - _NUM_FAULTS_SHOWN} more" if len(faults) > _NUM_FAULTS_SHOWN else ""
        raise CheckpointError(
            f"{checkpoint}: {len(faults)} tensors cannot be exported as {dtype}:\n  "
            + "\n  ".join(faults[:_NUM_FAULTS_SHOWN])
            + more
        )
    _name_files(out, files, sum(_report_bytes(report) for report in reports))
    described = {
        "checkpoint": checkpoint.name,
        "dtype": dtype,
        "on_overflow": on_overflow,
        "tied": {alias.removeprefix(_PREFIX): name.removeprefix(_PREFIX) for alias, name in source.tied.items()},
        "tensors": [asdict(report) for report in reports],
    }
    (out / "export_report.json").write_text(json.dumps(described, indent=1) + "\n")
    return reports


def copy_model_files(run: Path, out: Path) -> None:
    """Copy configuration, tokenizer and image processor, and the list of answers where there is one.

    Raises:
        CheckpointError: the run has no configuration.
    """
    if not (run / "model" / "config.json").is_file():
        raise CheckpointError(f"{run / 'model'}: has no config.json; is {run} the folder of a run?")
    shutil.copytree(run / "model", out, copy_function=shutil.copyfile, dirs_exist_ok=True)


def _convert(
    name: str, tensor: Tensor, target: torch.dtype, on_overflow: OnOverflow
) -> tuple[Tensor, TensorReport, str]:
    """The tensor as it is written, its report, and why it cannot be (empty if it can)."""
    largest, num_over, num_flushed, fault = 0.0, 0, 0, ""
    converted = tensor
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        largest = max(abs(float(low)), abs(float(high)))
        limit = torch.finfo(target).max
        if not (torch.isfinite(low) and torch.isfinite(high)):
            num_bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            fault = (
                f"{name}: {num_bad} of {tensor.numel()} values are not finite; export an earlier checkpoint with --tag"
            )
        elif largest > limit:
            num_over = int((tensor.abs() > limit).sum())
            if on_overflow == "error":
                fault = (
                    f"{name}: {num_over} of {tensor.numel()} values, up to {largest:.6g}, exceed {limit:.6g}; use "
                    "--dtype bf16 or fp32, or --on-overflow clamp or keep-fp32"
                )
            elif on_overflow == "clamp":
                tensor = tensor.clamp(-limit, limit)
            else:
                target = torch.float32
        converted = tensor.to(target)
        num_flushed = int(torch.count_nonzero(tensor)) - int(torch.count_nonzero(converted))
    elif tensor.is_floating_point():
        converted = tensor.to(target)
    converted = converted.contiguous()
    # NumPy's view of the memory: no copy is made to hash it.
    digest = hashlib.sha256(converted.view(-1).view(torch.uint8).numpy().data).hexdigest()
    kind = str(converted.dtype).removeprefix("torch.")
    return converted, TensorReport(name, list(tensor.shape), kind, largest, num_over, num_flushed, digest), fault


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _report_bytes(report: TensorReport) -> int:
    dtype: torch.dtype = getattr(torch, report.dtype)
    return torch.Size(report.shape).numel() * dtype.itemsize


def _name_files(out: Path, files: list[list[str]], total_bytes: int) -> None:
    """Give the parts the names that transformers looks for, now that their number is known."""
    if len(files) == 1:
        (out / "part_0").rename(out / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (out / f"part_{number}").rename(out / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _flush(folder: Path) -> None:
    """Force all files to disk, readable as the user's umask allows."""
    for path in folder.rglob("*"):
        if path.is_file():
            make_readable(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)
