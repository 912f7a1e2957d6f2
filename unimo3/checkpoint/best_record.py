"""Which checkpoint of a run did best on held-out data: ``RUN/best.json``. Retention spares it.

Source: none.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

BEST = "best.json"


@dataclass(frozen=True)
class BestRecord:
    """A checkpoint and what it reached.

    Attributes:
        tag: the checkpoint's name.
        figure: name of the held-out figure.
        data: fingerprint of the held-out data.
    """

    tag: str
    step: int
    figure: str
    value: float
    data: str


def read_best(run: Path) -> BestRecord | None:
    """The run's best checkpoint, if one was noted and the note can be read."""
    try:
        return BestRecord(**json.loads((run / BEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_best(run: Path, record: BestRecord) -> None:
    """Note a committed checkpoint as the best, by rename."""
    staging = run / f"{BEST}.tmp"
    staging.write_text(json.dumps(asdict(record), indent=1) + "\n")
    staging.replace(run / BEST)
