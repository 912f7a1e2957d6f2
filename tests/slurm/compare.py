"""Whether an interrupted run is as if nothing had been."""

import json
import re
from pathlib import Path

from slurm.history import Attempt
from tests.integration.conftest import losses
from tests.slurm.jobs import NUM_STEPS
from unimo3.training.metrics import read_metrics


def ledger(run: Path) -> dict[int, list[str]]:
    """Sample keys of each step, over all ranks, however many there were."""
    keys_of: dict[int, list[str]] = {}
    for path in sorted((run / "ledger").glob("*.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            keys_of.setdefault(record["step"], []).extend(record["keys"])
    return {step: sorted(keys) for step, keys in keys_of.items()}


def assert_as_if_undisturbed(run: Path, straight: Path) -> None:
    """Every step once, with the losses and the samples of a run that nothing disturbed."""
    assert [record["step"] for record in read_metrics(run)] == list(range(1, NUM_STEPS + 1))
    assert losses(run) == losses(straight)
    assert ledger(run) == ledger(straight)


def assert_saved(first: Attempt, second: Attempt, num_done: int) -> None:
    """A start that was asked to stop has saved, and the next begins there.

    Args:
        num_done: steps that were done when it was asked.
    """
    assert first.status == 75
    assert second.checkpoint is not None
    assert second.checkpoint >= num_done


def assert_no_step_was_done_twice(log: str) -> None:
    """By the lines of all starts, which have each step once it is done (``training.log_every 1``)."""
    assert [int(step) for step in re.findall(rf"step (\d+)/{NUM_STEPS} ", log)] == list(range(1, NUM_STEPS + 1))
