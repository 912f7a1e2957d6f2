"""Nodes that failed a check: a ledger that all jobs share, whose entries expire.

    {"node", "reason", "job", "until"}, one object a line; until: seconds since 1970

Source: none.
"""

import json
import os
import time
from pathlib import Path

DEFAULT = Path("slurm") / "bad_nodes.jsonl"
HOURS = 12.0


def path_of() -> Path:
    """Where the ledger is: BAD_NODES in the environment, or next to the job scripts."""
    return Path(os.environ.get("BAD_NODES", "") or DEFAULT)


def add(node: str, reason: str, job: str, hours: float = HOURS) -> None:
    """Note a node for some hours."""
    entry = {"node": node, "reason": reason, "job": job, "until": round(time.time() + 3600 * hours)}
    with path_of().open("a") as file:
        file.write(json.dumps(entry) + "\n")


def current() -> dict[str, str]:
    """Nodes noted and not yet expired, with the reason."""
    path = path_of()
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            if entry["until"] > time.time():
                found[entry["node"]] = entry["reason"]
        except (ValueError, KeyError, TypeError):
            continue
    return found
