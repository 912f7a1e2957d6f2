"""What can be found wrong with a training job before a node is booked.

The settings themselves for every number of nodes, and so the ds_config, shards and weights, which they name; disk for
the checkpoints; grace and wall time against what the run itself has measured.

Source: none.
"""

import importlib
import math
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from slurm.booking import Booking
from slurm.runs import checkpoint_bytes
from unimo3 import config
from unimo3.errors import ConfigError

# A save that takes longer than usual must still fit, and so must the start of one.
_GRACE_FACTOR, _GRACE_SLACK_S = 2.0, 60.0
_TASKS = Path(__file__).parents[1] / "finetune"


def check(booking: Booking, module: str, training: list[str], run: Path | None) -> tuple[list[str], list[str]]:
    """Faults, for which nothing is submitted, and notices; one line each.

    Args:
        module: the program, which exists.
        training: its arguments.
        run: None: not known, so what depends on it is not looked at.
    """
    program, faults = importlib.import_module(module), list[str]()
    settings: Any = None
    # Once for the settings themselves, then for the other numbers of nodes what depends on them.
    for number in booking.nodes:
        settings_found, found = _parse(program, training, number * booking.ranks_per_node)
        settings = settings or settings_found
        if len(booking.nodes) > 1:
            found = [f"{line} ({number} nodes)" if "does not divide" in line else line for line in found]
        faults += [line for line in found if line not in faults]
    notices: list[str] = []
    if settings is not None and run is not None:
        faults += _disk_faults(run, settings)
        if booking.time_s is not None:
            found, notices = _time_faults(run, settings, booking.grace_s, booking.time_s, booking.chain)
            faults += found
    return faults, notices


def missing_program(module: str) -> list[str]:
    """A fault if a task of fine-tuning is none."""
    tasks = sorted(path.stem for path in _TASKS.glob("*.py") if path.stem != "__init__")
    if not module.startswith("finetune.") or module.removeprefix("finetune.") in tasks:
        return []
    return [f"'{module}': there is no such program; finetune takes a task first: {', '.join(tasks)}"]


def _parse(program: Any, training: list[str], world_size: int) -> tuple[Any, list[str]]:
    """The program's settings as it would read them on so many ranks, None if it refuses them; and its faults."""
    kind = next(
        value for name, value in vars(program).items()
        if name.endswith("Config") and getattr(value, "__module__", "") == program.__name__
    )  # fmt: skip
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        return config.parse(kind, training, f"python -m {program.__name__}", program.__doc__ or ""), []
    except ConfigError as error:
        return None, error.faults
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _disk_faults(run: Path, settings: Any) -> list[str]:
    """Whether the checkpoints that are to be kept, and the one that is being written, find room."""
    size = checkpoint_bytes(run) or _estimated_bytes(settings)
    held = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    every, steps = settings.checkpoint.keep_every, settings.training.steps
    number = settings.checkpoint.keep_last + 1 + (steps // every if every else 0)
    place = next(parent for parent in (run, *run.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if number * size <= free + held:
        return []
    return [
        f"{run}: {number} checkpoints of {size / 1e9:.1f} GB need {number * size / 1e9:.1f} GB, "
        f"{(free + held) / 1e9:.1f} GB are free; lower checkpoint.keep_last or keep_every, or choose another run.dir"
    ]


def _estimated_bytes(settings: Any) -> int:
    """Size of a checkpoint of a model that has none yet: 12 bytes a parameter. 0 if it starts from weights."""
    if not hasattr(settings, "model"):
        return 0
    from unimo3.training.plan.memory import model_sizes
    from unimo3.training.plan.trace import build_on_meta

    return 12 * model_sizes(build_on_meta(settings.model.to_config())).total


def _time_faults(run: Path, settings: Any, grace_s: int, time_s: float, chain: int) -> tuple[list[str], list[str]]:
    """Grace and wall time against what the run's own figures say."""
    from unimo3.training.metrics import read_metrics

    steps = read_metrics(run)[-200:]
    step_s = median(record["step_s"] for record in steps) if steps else 0.0
    saves = [record["save_s"] for record in read_metrics(run, group="save")]
    faults, notices = [], []
    needed = _GRACE_FACTOR * max(saves, default=0.0) + step_s + _GRACE_SLACK_S
    if saves and grace_s < needed:
        faults.append(
            f"--grace {grace_s}: a save has taken {max(saves):.1f} s and a step takes {step_s:.1f} s; at least "
            f"{math.ceil(needed)} are needed"
        )
    if steps:
        left_s = (settings.training.steps - steps[-1]["step"]) * step_s
        links = -(-left_s // max(1.0, time_s - grace_s))
        if time_s - grace_s < step_s + max(saves, default=0.0):
            faults.append(f"--time: {time_s:.0f} s leave no room for one step of {step_s:.1f} s and a save")
        notices.append(f"{left_s / 3600:.1f} hours of steps are left: {links:.0f} times --time, {chain} in the chain")
    return faults, notices
