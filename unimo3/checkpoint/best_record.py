"""The checkpoint of a run that is best on held-out data: ``RUN/best.json``. It is never pruned.

Source: none.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from unimo3.atomic_write import replace_text
from unimo3.checkpoint.manifest import read_with_retries
from unimo3.errors import ConfigError, UnreachableError
from unimo3.versions import check_version

BEST = "best.json"
_VERSION = 1


@dataclass(frozen=True)
class BestRecord:
    """A checkpoint and its held-out metric.

    Attributes:
        tag: the checkpoint's name.
        metric: name of the held-out metric.
        data: fingerprint of the held-out data.
    """

    tag: str
    step: int
    metric: str
    value: float
    data: str


def read_best(run: Path) -> BestRecord | None:
    """The run's best checkpoint, if one was recorded and the record can be read.

    Raises:
        ConfigError: a newer program recorded it.
        UnreachableError: the storage does not answer; there may be one.
        OSError: the file cannot be read for another reason.
    """
    try:
        content = json.loads(read_with_retries(run / BEST, (run / BEST).read_text))
        check_version(run / BEST, content, (_VERSION,))
        content.pop("version", None)
        if "figure" in content:  # the field's name until version 0.1
            content["metric"] = content.pop("figure")
        record = BestRecord(**content)
        return record if isinstance(record.tag, str) else None
    except (ConfigError, UnreachableError):
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def write_best(run: Path, record: BestRecord) -> None:
    """Record a committed checkpoint as the best, by rename."""
    replace_text(run / BEST, json.dumps({"version": _VERSION} | asdict(record), indent=1) + "\n")
