"""Helpers of the export tests: planted values, other programs' folders, and the program itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import export as program

OPTIM = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"
MB = 10**6


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000004"


def expected_weights(results: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ranks gathered, as it should be written: cast, without the second name of the tied weight."""
    weights = {name.removeprefix("model."): weight for name, weight in results["weights"].items()}
    return {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}


def plant(folder: Path, **values: float) -> None:
    """Overwrite the first trained values of rank 0, which are ``embed.weight``'s."""
    saved = torch.load(folder / OPTIM, weights_only=False)
    first = saved["optimizer_state_dict"]["fp32_flat_groups"][0]
    with torch.no_grad():
        for index, value in enumerate(values.values()):
            first[index] = value
    torch.save(saved, folder / OPTIM)


def flip(path: Path, offset: int) -> None:
    """Change a bit of a byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def strip_to_plain(checkpoint: Path, folder: Path, tag: str = "global_step4") -> Path:
    """What DeepSpeed alone writes: its files below `folder`, and ``latest``."""
    (folder / tag).mkdir(parents=True)
    for path in checkpoint.glob("*_states.pt"):
        shutil.copyfile(path, folder / tag / path.name)
    (folder / "latest").write_text(tag)
    return folder / tag


def report_of(out: Path, name: str) -> dict[str, Any]:
    tensors = json.loads((out / "export_report.json").read_text())["tensors"]
    return next(entry for entry in tensors if entry["name"] == name)


def run_program(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code
