"""Files of one JSON object a line, to which processes append and which a kill may cut off.

Source: JSON Lines (jsonlines.org); write(2) with O_APPEND.
"""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from unimo3.versions import check_version

log = logging.getLogger(__name__)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a record, on disk when this returns; after a line that a kill has cut off, on a new line.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        is_cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = b"\n" * is_cut_off + json.dumps(record).encode() + b"\n"
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[os.write(descriptor, line) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All complete records; a line that is damaged is skipped and reported. A missing file has none.

    Raises:
        ConfigError: a newer program wrote one.
    """
    if not path.is_file():
        return []
    records, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            check_version(path, record)
            records.append(record)
        elif line.strip():
            damaged.append(number)
    if damaged:
        log.warning("%s: %d damaged lines are skipped, the first is line %d", path, len(damaged), damaged[0])
    return records
