"""Saves behind the training, and what a failed save does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.background_ranks import load_good, save_in_background
from tests.spawn import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("background")


@pytest.fixture(scope="module")
def results(root: Path) -> list[dict[str, Any]]:
    return run_ranks(2, save_in_background, root)


@pytest.mark.integration
def test_a_second_save_waits_for_the_first(results):
    for rank in results:
        assert rank["after the second"] == ["step_00000002"]
        assert rank["finished"] == ["step_00000002", "step_00000004"]


@pytest.mark.integration
def test_a_background_save_writes_the_state_at_its_start(results, root):
    """Not what training made of it meanwhile."""
    before, after = results[0]["saved"], run_ranks(2, load_good, root)[0]
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[name], value, rtol=0, atol=0)
        else:
            assert after[name] == value


@pytest.mark.integration
def test_a_failure_is_raised_on_every_rank_and_old_checkpoints_stay(results):
    for rank in results:
        assert "rank 1: " in rank["stop"]
        assert "earlier checkpoints are untouched" in rank["stop"]
        assert rank["remaining"] == ["step_00000002", "step_00000004"]


@pytest.mark.integration
def test_a_failure_on_one_rank_is_raised_on_every_rank(results):
    for rank in results:
        assert "saving step_00000005 failed (division by zero)" in rank["on rank 0 alone"]


@pytest.mark.integration
def test_the_copy_takes_no_more_memory_than_the_files(results):
    for rank in results:
        assert 0 < rank["copies bytes"] <= rank["files bytes"]


@pytest.mark.integration
def test_with_warn_training_continues_but_the_last_save_must_succeed(results):
    for rank in results:
        assert rank["warn"] is None
        assert (rank["best that failed"], rank["best"]) == (False, True)
        assert "rank 1: " in rank["last"]
        assert rank["last after a failure"] == ["step_00000007"]
        assert rank["in the end"] == ["step_00000002", "step_00000004", "step_00000008"]
