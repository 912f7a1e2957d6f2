"""What a job requests of Slurm: nodes, processes, wall time, grace, links.

Source: sbatch(1).
"""

import argparse
import re
from dataclasses import dataclass

from slurm.site_config import Site, option_of

_DEFAULT_TIME, _DEFAULT_GRACE_S = "24:00:00", 300
# Before its time limit a job has `_AT_END_S` of slurm/common.sh less, and the start of a save must fit, too.
_AT_END_S, GRACE_SLACK_S = 45, 60


@dataclass(frozen=True)
class Resources:
    """A job's size.

    Attributes:
        nodes: numbers of nodes that it may get.
        time_s: None: not known.
        grace_s: how long before its end it is signalled to save.
    """

    nodes: list[int]
    ranks_per_node: int
    time_s: float | None
    grace_s: int
    chain: int


def training_resources(args: argparse.Namespace, site: Site) -> tuple[Resources, list[str]]:
    """The resources of a training job, and its errors, one line each."""
    errors: list[str] = []
    nodes = node_counts(args.nodes)
    ranks = args.ranks_per_node if args.ranks_per_node is not None else site.ranks_per_node
    wall = args.time or option_of(site.sbatch_options, "time") or _DEFAULT_TIME
    signal = re.search(r"@(\d+)$", option_of(site.sbatch_options, "signal") or "")
    grace_s = args.grace if args.grace is not None else int(signal[1]) if signal else _DEFAULT_GRACE_S
    time_s = seconds(wall)
    if not nodes:
        errors.append(f"--nodes {args.nodes}: a number, or MIN-MAX with 1 <= MIN <= MAX, is needed")
    if ranks < 1:
        errors.append(f"--ranks-per-node {ranks}: at least 1 is needed")
    if time_s is None:
        errors.append(_TIME.format(wall))
    if args.chain < 1:
        errors.append(f"--chain {args.chain}: at least 1 link is needed")
    if grace_s <= GRACE_SLACK_S or (time_s is not None and grace_s >= time_s):
        errors.append(
            f"--grace {grace_s}: must be above {GRACE_SLACK_S} s and below --time; the job script requeues a program "
            f"that still runs {_AT_END_S} s before the time limit"
        )
    return Resources(nodes or [1], max(ranks, 1), time_s, grace_s, args.chain), errors


def cpu_job_errors(args: argparse.Namespace) -> list[str]:
    """Errors of an export's or a conversion's resources."""
    errors: list[str] = []
    ranks = args.ranks_per_node if args.ranks_per_node is not None else 1
    if args.nodes != "1":
        errors.append(f"--nodes {args.nodes}: {args.job} runs on 1 node")
    if ranks < 1:
        errors.append(f"--ranks-per-node {ranks}: at least 1 is needed")
    elif args.job == "export" and ranks > 1:
        errors.append(
            f"--ranks-per-node {ranks}: export runs as one process; use its --jobs to process several tensors at a time"
        )
    if args.time and seconds(args.time) is None:
        errors.append(_TIME.format(args.time))
    if args.grace is not None:
        errors.append(f"--grace {args.grace}: {args.job} is not signalled to save; leave it out")
    if args.chain != 1:
        errors.append(f"--chain {args.chain}: {args.job} is requeued before its time limit by itself; leave it out")
    return errors


_TIME = "--time {}: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS is needed"


def node_counts(nodes: str) -> list[int]:
    """Numbers of nodes of ``N`` or ``MIN-MAX``; empty if it is neither."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    if not match:
        return []
    least, most = int(match[1]), int(match[2] or match[1])
    return list(range(least, most + 1)) if 1 <= least <= most else []


def seconds(time: str) -> float | None:
    """Seconds of a time as sbatch takes it; None if it is invalid."""
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
