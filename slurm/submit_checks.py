"""Checks of a job before it is submitted.

Training: the settings for every number of nodes, and so the ds_config, shards and weights that they name; disk for the
checkpoints; grace and wall time against what the run itself has measured. Exports and conversions: what the programs
themselves would refuse, and room for what they write.

Source: docs/checkpoints.md for what a checkpoint contains.
"""

import importlib
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

from slurm.resources import GRACE_SLACK_S, Resources
from slurm.runs import checkpoint_bytes
from unimo3 import config
from unimo3.errors import CheckpointError, ConfigError, Unimo3Error

ErrorsAndNotices = tuple[list[str], list[str]]

# A save that takes longer than usual must still fit.
_GRACE_FACTOR = 2.0
_GB = 1e9
# The weights in float32 and Adam's two moments; an export in float32.
_CHECKPOINT_BYTES_PER_PARAMETER, _EXPORT_BYTES_PER_PARAMETER = 12, 4


def check_training(resources: Resources, module: str, training: list[str], run: Path | None) -> ErrorsAndNotices:
    """Errors, which prevent submission, and notices; one line each.

    Args:
        module: the program, which exists.
        training: its arguments.
        run: None: not known; checks that need it are skipped.
    """
    program, errors = importlib.import_module(module), list[str]()
    settings: Any = None
    # For each number of nodes, since some errors depend on it.
    for number in resources.nodes:
        parsed, lines = _parse(program, training, number * resources.ranks_per_node)
        settings = settings or parsed
        if len(resources.nodes) > 1:
            lines = [f"{line} ({number} nodes)" if "does not divide" in line else line for line in lines]
        errors += [line for line in lines if line not in errors]
    notices: list[str] = []
    if run is not None and (run / "stop").exists():
        errors.append(f"{run / 'stop'}: this file makes every start of the run exit immediately; remove the file")
    if settings is not None and run is not None:
        errors += checkpoint_errors(run, settings)
        if resources.time_s is not None:
            time_errors, notices = _time_errors(run, settings, resources.grace_s, resources.time_s, resources.chain)
            errors += time_errors
    return errors, notices


def _parse(program: Any, training: list[str], world_size: int) -> tuple[Any, list[str]]:
    """The program's settings as it would read them on so many ranks, None if it refuses them; and its errors."""
    kind = next(
        value
        for name, value in vars(program).items()
        if name.endswith("Config") and getattr(value, "__module__", "") == program.__name__
    )
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


def _time_errors(run: Path, settings: Any, grace_s: int, time_s: float, chain: int) -> ErrorsAndNotices:
    """Grace and wall time against what the run itself has measured."""
    from unimo3.training.metrics import read_metrics

    steps = read_metrics(run)[-200:]
    step_s = median(record["step_s"] for record in steps) if steps else 0.0
    saves = [record["save_s"] for record in read_metrics(run, group="save")]
    errors, notices = [], []
    needed = _GRACE_FACTOR * max(saves, default=0.0) + step_s + GRACE_SLACK_S
    if saves and grace_s < needed:
        errors.append(
            f"--grace {grace_s}: a save has taken {max(saves):.1f} s and a step takes {step_s:.1f} s; at least "
            f"{math.ceil(needed)} are needed"
        )
    if not steps:
        notices.append("the run has no steps yet: --grace, --time and --chain could not be checked")
    else:
        left_s = (settings.training.steps - steps[-1]["step"]) * step_s
        links = math.ceil(left_s / max(1.0, time_s - grace_s))
        if time_s - grace_s < step_s + max(saves, default=0.0):
            errors.append(
                f"--time: {time_s:.0f} s minus the grace period is too short for one step of {step_s:.1f} s and a save"
            )
        jobs = "1 job" if links == 1 else f"{links} jobs"
        remaining = f"{left_s / 3600:.1f} hours of steps remain, which needs {jobs} of length --time"
        if 1 < chain < links:
            errors.append(f"--chain {chain}: {remaining}; give --chain {links}, or a longer --time")
        else:
            notices.append(f"{remaining}, and the chain has {chain}")
    return errors, notices


def check_export(arguments: list[str], is_later: bool) -> ErrorsAndNotices:
    """Errors, which prevent submission, and notices; one line each.

    Args:
        arguments: of pretrain.export.
        is_later: whether the job waits for another, which may bring the checkpoint.
    """
    from pretrain import export
    from unimo3.checkpoint.torch_file import close_files
    from unimo3.checkpoint.zero_reader import ZeroCheckpoint
    from unimo3.dtypes import dtype_of

    try:
        args = export.parse_arguments(arguments)
    except ConfigError as error:
        return error.errors, []
    errors: list[str] = []
    try:
        export.check(args)
    except ConfigError as error:
        errors = error.errors
    if isinstance(args.run, str):
        return stored_export_errors(args, errors, is_later)
    try:
        source = ZeroCheckpoint(export.choose_checkpoint(args.run, args.tag, verify=False).checkpoint)
    except CheckpointError as error:
        if is_later:
            return errors, [f"nothing to export yet: {error}"]
        return [*errors, str(error)], []
    finally:
        close_files()
    item_bytes = dtype_of(args.dtype).itemsize
    needed, free = 0, free_bytes(args.out)
    for name in source.names():
        dtype = source.dtype(name)
        needed += source.shape(name).numel() * (item_bytes if dtype.is_floating_point else dtype.itemsize)
    if needed > free:
        errors.append(
            f"--out {args.out}: the weights need {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; make room or "
            "choose another folder"
        )
    return errors, []


def stored_export_errors(args: Namespace, errors: list[str], is_later: bool) -> ErrorsAndNotices:
    """`check_export` of a run in an object store, whose checkpoint is copied next to the output first."""
    from unimo3.checkpoint.stored_run import StoredRun

    try:
        remote = StoredRun(args.run)
        needed = sum(stored.num_bytes for stored in remote.files_of(remote.choose(args.tag)).values())
    except Unimo3Error as error:
        if is_later:
            return errors, [f"nothing to export yet: {error}"]
        return [*errors, str(error)], []
    if needed > (free := free_bytes(args.out)):
        errors.append(
            f"--out {args.out}: the copy of the checkpoint needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
            "make room or choose another folder"
        )
    return errors, []


def check_shards(arguments: list[str]) -> ErrorsAndNotices:
    """As `check_export`, of pretrain.prepare_shards."""
    from pretrain import prepare_shards
    from unimo3.data.upload import check_upload

    try:
        args = prepare_shards.parse_arguments(arguments)
        prepare_shards.check(args)
        if args.url:
            check_upload(prepare_shards.conversion_of(args))
    except ConfigError as error:
        return error.errors, []
    if args.verify or args.format == "index":
        return [], []
    # Shards contain the images as they are, and little else.
    sources = {args.src.resolve(), (args.images or args.src).resolve()}
    size = sum(size_of(folder) for folder in sources if not sources & set(folder.parents))
    free = free_bytes(args.out) + size_of(args.out.with_name(args.out.name + ".partial"))
    free += size_of(args.out) if args.url else 0  # complete, and still to be sent
    name = "--staging" if args.url else "--out"
    room = f"the source has {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free"
    if size > free and not args.max_side:
        return [f"{name} {args.out}: {room}; make room, choose another folder, or give --max-side to store less"], []
    return [], [f"{name} {args.out}: {room}"]


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
    """An error if there is no room for the checkpoints that a run keeps and the one being written.

    Args:
        settings: of pretraining or of fine-tuning.
    """
    parameters = _num_parameters(run, settings)
    size = checkpoint_bytes(run) or _CHECKPOINT_BYTES_PER_PARAMETER * parameters
    number = 0 if _only_evaluates(settings) else _num_retained(settings) + 1
    export = _EXPORT_BYTES_PER_PARAMETER * parameters if _exports_init(run, settings) else 0
    saved = size_of(run / "checkpoints")
    needed, free = number * size + export, free_bytes(run)
    if needed <= free + saved:
        return []
    what = [f"{number} checkpoints of {size / _GB:.1f} GB"] if number else []
    what += [f"the export of init's weights of {export / _GB:.1f} GB"] if export else []
    return [
        f"{run}: {' and '.join(what)} need {needed / _GB:.1f} GB, {(free + saved) / _GB:.1f} GB are free; lower "
        "checkpoint.keep_last or keep_every, or choose another run.dir"
    ]


def _num_retained(settings: Any) -> int:
    every, steps = settings.checkpoint.keep_every, settings.training.steps
    keeps_best = hasattr(settings, "best") and settings.best.keep and settings.data.val is not None
    number: int = settings.checkpoint.keep_last + (steps // every if every else 0) + keeps_best
    return number


def _only_evaluates(settings: Any) -> bool:
    return getattr(settings, "eval_only", False)


def _num_parameters(run: Path, settings: Any) -> int:
    """Parameters of the model that a recipe of pretraining describes, or whose weights fine-tuning starts from."""
    from unimo3.checkpoint.initial_weights import config_of
    from unimo3.training.plan.memory import model_sizes
    from unimo3.training.plan.step_trace import build_on_meta

    is_new = hasattr(settings, "model")
    model = settings.model_in_run().to_config() if is_new else config_of(settings.init, run)
    return model_sizes(build_on_meta(model)).total


def _exports_init(run: Path, settings: Any) -> bool:
    """Whether a run starts from another run, whose weights it exports into its own folder first, and has not yet."""
    from unimo3.checkpoint.initial_weights import exports

    init = settings.model.init if hasattr(settings, "model") else getattr(settings, "init", "")
    return exports(init or "", run)
