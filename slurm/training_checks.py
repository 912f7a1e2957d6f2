"""What can be found wrong with a training job before a node is booked.

The settings themselves for every number of nodes, and so the ds_config, shards and weights, which they name; disk for
the checkpoints; grace and wall time against what the run itself has measured.

Source: none.
"""

import importlib
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

from slurm.booking import Booking
from slurm.disk import checkpoint_errors
from unimo3 import config
from unimo3.errors import ConfigError

# A save that takes longer than usual must still fit, and so must the start of one.
_GRACE_FACTOR, _GRACE_SLACK_S = 2.0, 60.0


def check(booking: Booking, module: str, training: list[str], run: Path | None) -> tuple[list[str], list[str]]:
    """Errors, for which nothing is submitted, and notices; one line each.

    Args:
        module: the program, which exists.
        training: its arguments.
        run: None: not known, so what depends on it is not looked at.
    """
    program, errors = importlib.import_module(module), list[str]()
    settings: Any = None
    # Once for the settings themselves, then for the other numbers of nodes what depends on them.
    for number in booking.nodes:
        settings_found, found = _parse(program, training, number * booking.ranks_per_node)
        settings = settings or settings_found
        if len(booking.nodes) > 1:
            found = [f"{line} ({number} nodes)" if "does not divide" in line else line for line in found]
        errors += [line for line in found if line not in errors]
    notices: list[str] = []
    if run is not None and (run / "stop").exists():
        errors.append(f"{run / 'stop'}: asks every start of the run to end at once; remove the file")
    if settings is not None and run is not None:
        errors += checkpoint_errors(run, settings)
        if booking.time_s is not None:
            found, notices = _time_errors(run, settings, booking.grace_s, booking.time_s, booking.chain)
            errors += found
    return errors, notices


def _parse(program: Any, training: list[str], world_size: int) -> tuple[Any, list[str]]:
    """The program's settings as it would read them on so many ranks, None if it refuses them; and its errors."""
    kind = next(
        value for name, value in vars(program).items()
        if name.endswith("Config") and getattr(value, "__module__", "") == program.__name__
    )  # fmt: skip
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        return config.parse(kind, training, f"python -m {program.__name__}", program.__doc__ or ""), []
    except ConfigError as error:
        return None, error.errors
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _time_errors(run: Path, settings: Any, grace_s: int, time_s: float, chain: int) -> tuple[list[str], list[str]]:
    """Grace and wall time against what the run's own figures say."""
    from unimo3.training.metrics import read_metrics

    steps = read_metrics(run)[-200:]
    step_s = median(record["step_s"] for record in steps) if steps else 0.0
    saves = [record["save_s"] for record in read_metrics(run, group="save")]
    errors, notices = [], []
    needed = _GRACE_FACTOR * max(saves, default=0.0) + step_s + _GRACE_SLACK_S
    if saves and grace_s < needed:
        errors.append(
            f"--grace {grace_s}: a save has taken {max(saves):.1f} s and a step takes {step_s:.1f} s; at least "
            f"{math.ceil(needed)} are needed"
        )
    if not steps:
        notices.append("the run has no steps yet: --grace, --time and --chain were held against no figures of it")
    else:
        left_s = (settings.training.steps - steps[-1]["step"]) * step_s
        links = math.ceil(left_s / max(1.0, time_s - grace_s))
        if time_s - grace_s < step_s + max(saves, default=0.0):
            errors.append(f"--time: {time_s:.0f} s leave no room for one step of {step_s:.1f} s and a save")
        left = f"{left_s / 3600:.1f} hours of steps are left: {links} times --time"
        if 1 < chain < links:
            errors.append(f"--chain {chain}: {left}; give --chain {links}, or a longer --time")
        else:
            notices.append(f"{left}, {chain} in the chain")
    return errors, notices
