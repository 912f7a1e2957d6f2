"""What became of each start of a run: RUN/slurm/history.jsonl, one object a line.

    {"event": "begin", "time", "job", "restart", "nodes", "checkpoint"}
    {"event": "end", "time", "job", "status", "action", "reason", "checkpoint"}
    {"event": "exclude", "time", "job", "nodes"}: see bad_nodes.py

A begin without an end was cut off: by the loss of a node, a preemption without grace, a kill.

Source: none.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimo3.json_lines import append_record, read_records

FOLDER, FILE = "slurm", "history.jsonl"
_OF_BEGIN = {"job", "restart", "nodes", "checkpoint"}


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
        """Whether it ended with a status other than 0 or 75, or without a recorded one."""
        return self.status not in (0, 75)


def append(run: Path, event: str, **fields: Any) -> None:
    """Add a line, on disk when this returns."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    append_record(folder / FILE, {"event": event, "time": round(time.time(), 3), **fields})


def read(run: Path) -> list[Attempt]:
    """All starts, oldest first; a line cut off by a crash is skipped."""
    attempts: list[Attempt] = []
    for record in _records(run):
        event, when = record.pop("event"), record.pop("time")
        if event == "begin" and record.keys() >= _OF_BEGIN:
            attempts.append(Attempt(when, **_known(record)))
        elif event == "end" and "job" in record:
            job, checkpoint = record.pop("job"), record.pop("checkpoint", None)
            if not attempts or attempts[-1].job != job or attempts[-1].action is not None:
                attempts.append(Attempt(when, job, 0, "", checkpoint))  # the line of its begin is damaged
            attempts[-1] = replace(attempts[-1], ended=when, **_known(record))
    return attempts


def _known(record: dict[str, Any]) -> dict[str, Any]:
    """A record without fields that another version of the program adds."""
    return {name: value for name, value in record.items() if name in Attempt.__dataclass_fields__}


def excluded(run: Path, job: str) -> list[str]:
    """Nodes that a job excludes because they are listed as bad; a link of an array starts with those of the array."""
    names = (job, job.partition("_")[0])
    noted = [
        record.get("nodes", [])
        for record in _records(run)
        if record["event"] == "exclude" and record.get("job") in names
    ]
    return list(noted[-1]) if noted else []


def _records(run: Path) -> list[dict[str, Any]]:
    """All records but damaged ones."""
    return [record for record in read_records(run / FOLDER / FILE) if record.keys() >= {"event", "time"}]


def since_the_last_hold(attempts: list[Attempt]) -> list[Attempt]:
    """Starts that count: those after somebody looked at the job, and not those that were requeued on other nodes."""
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
