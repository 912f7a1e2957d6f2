"""Checks a training job, then submits it: ``python -m slurm.submit [OPTIONS] pretrain|finetune ARGUMENTS...``.

Everything that can be found wrong before a node is booked is, with all faults in one message: the settings themselves
for every number of nodes, the ds_config, shards and weights, disk for the checkpoints, the grace period against the
saves, the run's folder in use by another job. Then sbatch gets the same script and arguments as a user would give it.

Source: sbatch(1).
"""

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from slurm import bad_nodes, history, queue
from slurm.runs import ArgumentError, checkpoint_bytes, run_folder
from unimo3.errors import CommandParser, ConfigError, exit_with_status

ROOT = Path(__file__).parents[1]
_DEFAULT_TIME, _DEFAULT_GRACE_S = "24:00:00", 300
# A save that takes longer than usual must still fit, and so must the start of one.
_GRACE_FACTOR, _GRACE_SLACK_S = 2.0, 60.0
_PROGRAMS = ("pretrain", "finetune")


@dataclass(frozen=True)
class Site:
    """What slurm/site.env says."""

    ranks_per_node: int
    sbatch_options: list[str]


def read_site(path: Path) -> Site:
    """Have bash read the site's settings, as the job scripts do.

    Raises:
        ConfigError: bash cannot.
    """
    if not path.is_file():
        return Site(1, [])
    script = (
        'set -eu; SBATCH_OPTIONS=(); source "$1" >&2; '
        'printf "%s\\0" "${RANKS_PER_NODE:-${GPUS_PER_NODE:-1}}" "${SBATCH_OPTIONS[@]}"'
    )
    done = subprocess.run(["bash", "-c", script, "site", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{path}: bash cannot read it: {done.stderr.strip()[-300:]}")
    ranks, *options = done.stdout.split("\0")[:-1]
    if not ranks.isdigit() or int(ranks) < 1:
        raise ConfigError(f"{path}: GPUS_PER_NODE or RANKS_PER_NODE '{ranks}': a number of at least 1 is needed")
    return Site(int(ranks), options)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m slurm.submit", description=__doc__)
    parser.add_argument("--nodes", default="1", help="nodes, or MIN-MAX: any number between them (default: 1)")
    parser.add_argument(
        "--ranks-per-node", type=int, help="default: RANKS_PER_NODE or GPUS_PER_NODE of slurm/site.env, else 1"
    )
    parser.add_argument(
        "--time", help="wall time, as sbatch takes it (default: the site's, else the script's 24:00:00)"
    )
    parser.add_argument(
        "--grace", type=int,
        help="seconds before its end at which the run is told to save (default: the site's --signal, else 300)",
    )  # fmt: skip
    parser.add_argument("--chain", type=int, default=1, help="links, one after the other, for a run longer than the "
                        "wall time where jobs may not be requeued (default: 1)")  # fmt: skip
    parser.add_argument("--dependency", help="as sbatch takes it, such as afterok:123")
    parser.add_argument("--job-name", help="default: the run's name")
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command, submit nothing")
    parser.add_argument("job", choices=_PROGRAMS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of finetune the task first, then as in training")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Check, then submit."""
    args = parse_arguments(argv)
    site = read_site(Path(os.environ.get("UNIMO3_SITE", "") or ROOT / "slurm" / "site.env"))
    arguments = [argument for argument in args.arguments if argument != "--"]
    module = "pretrain.train" if args.job == "pretrain" else f"finetune.{arguments[0] if arguments else ''}"
    training = arguments if args.job == "pretrain" else arguments[1:]
    faults, notices = check(args, site, module, training)
    if faults:
        raise ConfigError(faults)
    command = sbatch_command(args, site, arguments, run_folder(training))
    if not site.sbatch_options:
        notices.append("slurm/site.env gives sbatch no options: no partition and no GPUs are asked for")
    for notice in notices:
        print(f"note: {notice}")
    if args.dry_run:
        print((ROOT / "slurm" / f"{args.job}.sbatch").read_text())
        print(shlex.join(command))
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: is not on this machine; --dry-run shows the command, unimo3.launch starts without Slurm"
        )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refuses it: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    print(f"job {number}: see it with python -m slurm.status {shlex.quote(str(run_folder(training)))}")


def sbatch_command(args: argparse.Namespace, site: Site, arguments: list[str], run: Path) -> list[str]:
    """The words of the sbatch command."""
    ranks = args.ranks_per_node or site.ranks_per_node
    words = ["sbatch", "--parsable", *site.sbatch_options, f"--nodes={args.nodes}", f"--ntasks-per-node={ranks}"]
    words.append(f"--job-name={args.job_name or run.name}")
    words += [f"--time={args.time}"] if args.time else []
    words += [f"--signal=USR2@{args.grace}"] if args.grace else []
    if excluded := sorted(bad_nodes.current()):
        words.append(f"--exclude={','.join(excluded)}")
    if args.chain > 1:
        words.append(f"--array=1-{args.chain}%1")
    if args.dependency:
        words.append(f"--dependency={args.dependency}")
    return [*words, str(ROOT / "slurm" / f"{args.job}.sbatch"), *arguments]


def check(args: argparse.Namespace, site: Site, module: str, training: list[str]) -> tuple[list[str], list[str]]:
    """Faults, for which nothing is submitted, and notices; one line each."""
    faults: list[str] = []
    nodes = _node_counts(args.nodes)
    ranks = args.ranks_per_node if args.ranks_per_node is not None else site.ranks_per_node
    wall = args.time or _option(site, "time") or _DEFAULT_TIME
    signal = _option(site, "signal") or ""
    grace_s = args.grace if args.grace is not None else int(signal.rpartition("@")[2] or _DEFAULT_GRACE_S)
    time_s = _seconds(wall)
    if not nodes:
        faults.append(f"--nodes {args.nodes}: a number, or MIN-MAX with 1 <= MIN <= MAX, is needed")
    if ranks < 1:
        faults.append(f"--ranks-per-node {ranks}: at least 1 is needed")
    if time_s is None:
        faults.append(f"--time {wall}: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS is needed")
    if args.chain < 1:
        faults.append(f"--chain {args.chain}: at least 1 link is needed")
    if grace_s < 1 or (time_s is not None and grace_s >= time_s):
        faults.append(f"--grace {grace_s}: at least 1 second and less than --time is needed")
    try:
        run = run_folder(training)
    except ArgumentError as error:
        return [*faults, str(error)], []
    settings: Any = None
    # Once for the settings themselves, then for the other numbers of nodes what depends on them.
    for number in nodes or [1]:
        settings_found, found = _parse(module, training, number * max(ranks, 1))
        settings = settings or settings_found
        if len(nodes) > 1:
            found = [f"{line} ({number} nodes)" if "does not divide" in line else line for line in found]
        faults += [line for line in found if line not in faults]
    if other := _active_job(run):
        faults.append(f"{run}: job {other} works on it; cancel that one, or choose another run.name")
    notices: list[str] = []
    if settings is not None:
        faults += _disk_faults(run, settings)
        if time_s is not None:
            found, notices = _time_faults(run, settings, grace_s, time_s, args.chain)
            faults += found
    return faults, notices


def _parse(module: str, training: list[str], world_size: int) -> tuple[Any, list[str]]:
    """The program's settings as it would read them on so many ranks, None if it refuses them; and its faults."""
    import importlib

    from unimo3 import config

    try:
        program = importlib.import_module(module)
    except ImportError:
        return None, [f"'{module}': there is no such program; finetune takes a task, such as vqa"]
    kind = next(
        value for name, value in vars(program).items()
        if name.endswith("Config") and getattr(value, "__module__", "") == module
    )  # fmt: skip
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        return config.parse(kind, training, f"python -m {module}", program.__doc__ or ""), []
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


def _active_job(run: Path) -> str | None:
    """A job that has begun on the run's folder and that Slurm still has."""
    attempts = history.read(run)
    return attempts[-1].job if attempts and queue.ask(attempts[-1].job) in queue.ACTIVE else None


def _option(site: Site, name: str) -> str | None:
    """What the site's own options say of one, given as ``--name=value``."""
    found = [option.partition("=")[2] for option in site.sbatch_options if option.startswith(f"--{name}=")]
    return found[-1] if found else None


def _node_counts(nodes: str) -> list[int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    if not found:
        return []
    least, most = int(found[1]), int(found[2] or found[1])
    return list(range(least, most + 1)) if 1 <= least <= most else []


def _seconds(time: str) -> float | None:
    """Seconds of a time as sbatch takes it."""
    days, dash, rest = time.partition("-") if "-" in time else ("0", "", time)
    parts = rest.split(":")
    if not all(part.isdigit() for part in (days, *parts)) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:  # DAYS-HOURS[:MINUTES[:SECONDS]]
        hours, minutes, seconds = ([*numbers, 0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # MINUTES[:SECONDS]
        hours, (minutes, seconds) = 0, ([*numbers, 0])[:2]
    return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds or None


if __name__ == "__main__":
    main()
