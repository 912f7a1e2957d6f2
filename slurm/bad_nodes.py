"""Nodes that failed a check, and which nodes a job excludes when it starts again.

    python -m slurm.bad_nodes --run RUN --excluded NODES        prints ``set NODES`` or ``keep``

The list of bad nodes is shared by all jobs, and its entries expire. Where it cannot be written, the nodes that
this run excludes are in RUN/slurm/bad_nodes.jsonl. Each line is one object; until is in seconds since 1970:

    {"node", "reason", "job", "until"}

A job always excludes the nodes that its user excluded, and those that the list has now. A node that was excluded
for the list alone is used again once its entry has expired. The run's history records these at each change:

    {"event": "exclude", "time", "job", "nodes"}

Source: scontrol(1), ExcNodeList.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from slurm import history
from slurm.commands import output_of, print_answer
from unimo3.json_lines import append_record, read_records

FILE = "bad_nodes.jsonl"
DEFAULT = Path("slurm") / FILE
HOURS = 12.0


def path_of() -> Path:
    """Where the list is: BAD_NODES in the environment, or slurm/ of the folder in which a job runs."""
    return Path(os.environ.get("BAD_NODES", "") or DEFAULT)


def add(run: Path, node: str, reason: str, job: str, hours: float = HOURS) -> None:
    """Note a node for some hours: for all jobs, or for this run alone if their list cannot be written.

    Raises:
        OSError: neither can be written.
    """
    entry = {"node": node, "reason": reason, "job": job, "until": round(time.time() + 3600 * hours)}
    try:
        path_of().parent.mkdir(parents=True, exist_ok=True)
        append_record(path_of(), entry)
    except OSError as error:
        print(f"{path_of()} cannot be written ({error.strerror}): only {run} excludes {node}", file=sys.stderr)
        append_record(run / history.FOLDER / FILE, entry)


def current(run: Path | None = None) -> dict[str, str]:
    """Nodes noted and not yet expired, with the reason; with those that only `run` excludes."""
    reasons: dict[str, str] = {}
    try:
        entries = read_records(path_of())
    except OSError as error:
        print(f"{path_of()} cannot be read ({error.strerror}): its nodes are not excluded", file=sys.stderr)
        entries = []
    if run is not None:
        entries += read_records(run / history.FOLDER / FILE)
    for entry in entries:
        node, until = entry.get("node"), entry.get("until")
        if isinstance(node, str) and isinstance(until, (int, float)) and until > time.time():
            reasons[node] = str(entry.get("reason", ""))
    return reasons


def choose(excluded: list[str], ours: list[str], bad: list[str]) -> tuple[list[str], list[str]]:
    """Nodes to exclude now, and those of them that only the list of bad nodes excludes.

    Args:
        excluded: nodes that the job excludes.
        ours: those that it excludes because of that list.
        bad: those in the list.
    """
    of_the_user = [node for node in excluded if node not in ours]
    added = [node for node in bad if node not in of_the_user]
    return sorted(of_the_user + added), sorted(added)


def expand(nodes: str) -> list[str]:
    """Single names of nodes listed as ``n[1-3],m7``."""
    if "[" not in nodes:
        return [node for node in nodes.split(",") if node]
    return output_of("scontrol", "show", "hostnames", nodes).split()


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m slurm.bad_nodes", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--excluded", default="", help="what the job excludes now, as single names with commas")
    args = parser.parse_args()
    job = os.environ["JOB"]
    excluded = [node for node in args.excluded.split(",") if node]
    ours = history.excluded(args.run, job)
    nodes, added = choose(excluded, ours, sorted(current(args.run)))
    if nodes == sorted(excluded):
        print_answer("keep")
        return
    history.append(args.run, "exclude", job=job, nodes=added)
    print_answer("set", ",".join(nodes))


if __name__ == "__main__":
    main()
