"""Keeping the checkpoint that does best on held-out data, and ending a run that gets no better.

Source: none.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from unimo3.checkpoint import store
from unimo3.checkpoint.best_record import BEST, BestRecord, read_best, write_best
from unimo3.distributed import from_first_rank, on_all_ranks, world
from unimo3.errors import CHECK_MOUNT
from unimo3.training.metrics import Metrics, read_metrics
from unimo3.training.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestArgs:
    """The best checkpoint on held-out data, and early stopping."""

    keep: bool = True
    """Whether the state of the best evaluation so far is saved, retained whatever checkpoint.keep_last is, and named in
    RUN/best.json; python -m pretrain.export RUN --tag best takes it. Not on splits named test or test-dev."""
    patience: int = 0
    """Evaluations in a row without a better metric after which the run exits with status 0. 0: never."""

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        if self.patience < 0:
            return [f"best.patience: {self.patience}: 0 or a number of evaluations is needed"]
        if self.patience and not self.keep:
            return [f"best.patience: {self.patience}: counts from the best checkpoint; set best.keep to true"]
        return []


class Best:
    """A run's best checkpoint by one metric on one set of held-out data; every rank has one and makes the same calls.

    Args:
        metric: larger is better.
        fingerprint: of the held-out data. None: nothing is chosen on this data; what was chosen before still counts.
        every: steps between evaluations. Patience counts those alone: not one where a start ended early, nor a second
            one of the same state.
    """

    def __init__(self, args: BestArgs, metric: str, fingerprint: str | None, every: int):
        self._args, self._metric, self._fingerprint, self._every = args, metric, fingerprint, every

    def consider(self, run: Run, metrics: Metrics, save: Callable[[], bool]) -> None:
        """Save the run's current state and record it as the best, if its metric is better than any before.

        Args:
            save: saves the state, and returns whether it is committed.
        """
        value, data = metrics.get(self._metric), self._fingerprint
        if value is None or data is None:
            return
        if not from_first_rank(f"reading {run.folder / BEST}", lambda: self._is_better(run, value), CHECK_MOUNT):
            return
        if save():
            record = BestRecord(store.tag_of(run.step), run.step, self._metric, value, data)

            def write() -> None:
                if world()[0] == 0:
                    write_best(run.folder, record)

            on_all_ranks("recording the best", write, store.SAVE_FIX)

    def last_step(self, run: Run, planned: int) -> int:
        """Where the run ends: at step `planned`, or here if patience is at its end."""
        is_past = from_first_rank(f"reading {run.folder / BEST}", lambda: self._is_past(run), CHECK_MOUNT)
        return run.step if is_past else planned

    def _is_better(self, run: Run, value: float) -> bool:
        best = read_best(run.folder)
        if best is None or not (store.folder_of(run.folder) / best.tag / store.MANIFEST).is_file():
            return True
        if best.data != self._fingerprint:
            log.warning(
                "%s stays the best checkpoint: it was chosen on other held-out data; remove best.json to choose again",
                best.tag,
            )
            return False
        return value > best.value

    def _is_past(self, run: Run) -> bool:
        best = read_best(run.folder)
        if not self._args.patience or not self._every or best is None:
            return False
        later = {
            record["step"]
            for record in read_metrics(run.folder, group="eval")
            if record.get("data") == best.data and record["step"] > best.step and record["step"] % self._every == 0
        }
        if len(later) < self._args.patience:
            return False
        log.info(
            "stopping early: in %d evaluations since %s, %s did not exceed %.4f (best.patience)",
            len(later),
            best.tag,
            best.metric,
            best.value,
        )
        return True
