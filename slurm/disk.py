"""Room on disks, and how much of it the checkpoints of a training run take.

Source: docs/checkpoints.md for what a checkpoint holds.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from slurm.runs import checkpoint_bytes

_GB = 1e9
# The weights in float32 and Adam's two moments; an export in float32.
_CHECKPOINT_BYTES_PER_PARAMETER, _EXPORT_BYTES_PER_PARAMETER = 12, 4


def free_bytes(folder: Path) -> int:
    """Room where a folder is or is to be."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())).free


def size_of(folder: Path) -> int:
    """Bytes of a folder's files, those of linked files and folders too; 0 if there is none."""
    total = 0
    for root, _, names in os.walk(folder, followlinks=True):
        total += sum(path.stat().st_size for name in names if (path := Path(root, name)).is_file())
    return total


def checkpoint_errors(run: Path, settings: Any) -> list[str]:
    """An error if what a run keeps, and the checkpoint that is being written, find no room.

    Args:
        settings: of pretraining or of fine-tuning.
    """
    parameters = _num_parameters(run, settings)
    size = checkpoint_bytes(run) or _CHECKPOINT_BYTES_PER_PARAMETER * parameters
    number = 0 if _only_evaluates(settings) else _num_kept(settings) + 1
    export = _EXPORT_BYTES_PER_PARAMETER * parameters if _exports_init(run, settings) else 0
    held = size_of(run / "checkpoints")
    needed, free = number * size + export, free_bytes(run)
    if needed <= free + held:
        return []
    what = [f"{number} checkpoints of {size / _GB:.1f} GB"] if number else []
    what += [f"the export of init's weights of {export / _GB:.1f} GB"] if export else []
    return [
        f"{run}: {' and '.join(what)} need {needed / _GB:.1f} GB, {(free + held) / _GB:.1f} GB are free; lower "
        "checkpoint.keep_last or keep_every, or choose another run.dir"
    ]


def _num_kept(settings: Any) -> int:
    every, steps = settings.checkpoint.keep_every, settings.training.steps
    keeps_best = hasattr(settings, "best") and settings.best.keep and settings.data.val is not None
    number: int = settings.checkpoint.keep_last + (steps // every if every else 0) + keeps_best
    return number


def _only_evaluates(settings: Any) -> bool:
    return getattr(settings, "eval_only", False)


def _num_parameters(run: Path, settings: Any) -> int:
    """Of the model that a recipe of pretraining describes, or whose weights fine-tuning starts from."""
    from unimo3.checkpoint.init import config_of
    from unimo3.training.plan.memory import model_sizes
    from unimo3.training.plan.trace import build_on_meta

    is_new = hasattr(settings, "model")
    return model_sizes(build_on_meta(settings.model.to_config() if is_new else config_of(settings.init, run))).total


def _exports_init(run: Path, settings: Any) -> bool:
    """Whether fine-tuning starts from a run, whose weights it exports into its own folder first, and has not yet."""
    from unimo3.checkpoint.init import exports

    return exports(getattr(settings, "init", ""), run)
