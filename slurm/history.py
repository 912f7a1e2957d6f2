"""What became of each start of a run: RUN/slurm/history.jsonl, one object a line.

    {"event": "begin", "time", "job", "restart", "nodes", "checkpoint"}
    {"event": "end", "time", "job", "status", "action", "reason", "checkpoint"}
    {"event": "exclude", "time", "job", "nodes"}: see bad_nodes.py

A begin without an end was cut off: by the loss of a node, a preemption without grace, a kill.

Source: none.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER, FILE = "slurm", "history.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start.

    Attributes:
        checkpoint: newest step when it began; None: there was none.
        action: what was done when it ended; None: it was cut off, or it is the one that runs now.
    """

    time: float
    job: str
    restart: int
    nodes: str
    checkpoint: int | None
    ended: float | None = None
    status: int | None = None
    action: str | None = None
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than the run itself wanted."""
        return self.status not in (0, 75)


def append(run: Path, event: str, **fields: Any) -> None:
    """Add a line, on disk when this returns."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n"
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(run: Path) -> list[Attempt]:
    """All starts, oldest first; a line cut off by a crash is skipped."""
    attempts: list[Attempt] = []
    for record in _records(run):
        event, when = record.pop("event"), record.pop("time")
        if event == "begin":
            attempts.append(Attempt(when, **record))
        elif event == "end" and attempts:
            last = attempts[-1]
            attempts[-1] = Attempt(
                last.time,
                last.job,
                last.restart,
                last.nodes,
                last.checkpoint,
                when,
                record["status"],
                record["action"],
                record["reason"],
            )
    return attempts


def excluded(run: Path, job: str) -> list[str]:
    """Nodes that a job excludes because of the ledger; a link of an array starts with those of the array."""
    names = (job, job.partition("_")[0])
    noted = [record["nodes"] for record in _records(run) if record["event"] == "exclude" and record["job"] in names]
    return list(noted[-1]) if noted else []


def _records(run: Path) -> Iterator[dict[str, Any]]:
    path = run / FOLDER / FILE
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def since_the_last_hold(attempts: list[Attempt]) -> list[Attempt]:
    """Starts that count: those after somebody looked at the job, and not those that were sent elsewhere."""
    holds = [index for index, attempt in enumerate(attempts) if attempt.action == "hold"]
    counted = attempts[holds[-1] + 1 :] if holds else attempts
    return [attempt for attempt in counted if attempt.action != "exclude"]


def starts_without_progress(attempts: list[Attempt], checkpoint: int | None) -> int:
    """How many of the last starts ended one after the other with no checkpoint newer than the one they began from."""
    number = 0
    for attempt in reversed(attempts):
        if attempt.status == 0 or attempt.checkpoint != checkpoint:
            break
        number += 1
    return number
