"""Which nodes a job leaves out when it starts again, as ``set NODES`` or ``keep``.

    python -m slurm.exclusions --run RUN --excluded NODES

Those that the user has excluded, always, and those that the ledger of bad nodes holds now: what was excluded for the
ledger's sake and has expired there is taken back. Which ones that were stands in the run's history, at each change:

    {"event": "exclude", "time", "job", "nodes"}

Source: scontrol(1), ExcNodeList.
"""

import argparse
import os
import subprocess
from pathlib import Path

from slurm import bad_nodes, history


def choose(excluded: list[str], ours: list[str], bad: list[str]) -> tuple[list[str], list[str]]:
    """Nodes to exclude now, and those of them that are excluded for the ledger's sake alone.

    Args:
        excluded: nodes that the job excludes.
        ours: those that it excludes for the ledger's sake.
        bad: those in the ledger.
    """
    of_the_user = [node for node in excluded if node not in ours]
    added = [node for node in bad if node not in of_the_user]
    return sorted(of_the_user + added), sorted(added)


def expand(nodes: str) -> list[str]:
    """Single names of nodes listed as ``n[1-3],m7``."""
    if "[" not in nodes:
        return [node for node in nodes.split(",") if node]
    return _told("scontrol", "show", "hostnames", nodes).split()


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m slurm.exclusions", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--excluded", default="", help="what the job excludes now, as single names with commas")
    args = parser.parse_args()
    job = os.environ["JOB"]
    excluded = [node for node in args.excluded.split(",") if node]
    ours = history.excluded(args.run, job)
    nodes, added = choose(excluded, ours, sorted(bad_nodes.current()))
    if nodes == sorted(excluded):
        print("keep")
        return
    history.append(args.run, "exclude", job=job, nodes=added)
    print("set", ",".join(nodes))


if __name__ == "__main__":
    main()
