"""The progress of a preparation, over all ranks.

Source: none.
"""

import logging
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from unimo3.data.shards import ShardDone

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 30.0


class PreparationProgress:
    """Counts what is done, and logs it every half a minute."""

    def __init__(self, unit: str):
        self.done = 0
        self.num_shards = 0
        self.rejects: list[dict[str, Any]] = []
        self.done_of: Counter[str] = Counter()
        self._unit = unit
        self._reused = 0
        self._started = self._shown = time.monotonic()

    def add(self, result: ShardDone) -> None:
        """Count a shard."""
        self.done += result.num_records
        self.done_of[result.split] += result.num_records
        self.num_shards += 1
        self._reused += result.num_records if result.reused else 0
        self.rejects += [asdict(reject) for reject in result.rejects]
        if time.monotonic() - self._shown > _REPORT_EVERY_S:
            self.show()

    def show(self) -> None:
        """Log the progress."""
        self._shown = time.monotonic()
        rate = (self.done - self._reused) / max(self._shown - self._started, 1e-9)
        log.info(
            "%d shards, %d %s (%d were there already), %.0f a second, %d rejected",
            self.num_shards,
            self.done,
            self._unit,
            self._reused,
            rate,
            len(self.rejects),
        )
