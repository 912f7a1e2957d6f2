"""Runs that change their number of ranks: 2 -> 1 -> 3 -> 4 -> 2, every value compared at every change."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.ranks import ELASTIC_RUNS, elastic_leg
from tests.spawn import run_ranks

SIZES = (2, 1, 3, 4, 2)
# Sums over ranks are taken in another order, in bf16 of rounded terms.
TOLERANCE = {"zero3": 5e-3, "zero3 fp32": 1e-6, "zero2": 5e-3}


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank of each leg told."""
    root: Path = tmp_path_factory.mktemp("elastic")
    return [run_ranks(size, elastic_leg, root, 2 * number) for number, size in enumerate(SIZES)]


@pytest.mark.integration
@pytest.mark.parametrize("run", ELASTIC_RUNS)
def test_every_value_is_as_it_was_saved(legs, run):
    for number in range(1, len(SIZES)):
        before, after = legs[number - 1][0][run]["saved"], legs[number][0][run]["loaded"]
        assert before.keys() == after.keys()
        for name, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[name].dtype
                torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=f"{name} with {SIZES[number]} ranks")
            else:
                assert after[name] == value, f"{name} with {SIZES[number]} ranks"


@pytest.mark.integration
@pytest.mark.parametrize("run", ELASTIC_RUNS)
def test_what_is_compared_was_trained(legs, run):
    first, last = legs[0][0][run]["saved"], legs[-1][0][run]["saved"]
    same = {name for name in first if isinstance(first[name], torch.Tensor) and first[name].equal(last[name])}
    assert same == {"fp32 model.frozen.weight", "fp32 model.count", "fp32 model.shift"}
    assert last["steps"] == {10.0}
    assert last["counters"][:2] == (10, 120)
    assert [(round(group["weight_decay"], 6), group["lr"]) for group in last["groups"]] == [(0.11, 0.005), (0.02, 0.01)]


@pytest.mark.integration
@pytest.mark.parametrize("run", ELASTIC_RUNS)
def test_losses_are_those_of_a_run_that_never_changed(legs, run):
    straight = legs[0][0][run]["losses"]
    changed = [loss for leg in legs for loss in leg[0][run]["losses"][:2]]
    assert len(straight) == len(changed) == 10
    assert changed == pytest.approx(straight, abs=TOLERANCE[run])


@pytest.mark.integration
@pytest.mark.parametrize("run", ELASTIC_RUNS)
def test_generators_go_on_and_new_ranks_have_their_own(legs, run):
    for before, after in itertools.pairwise(legs):
        told = [rank[run]["drawn at first"] for rank in after]
        kept = min(len(before), len(after))
        assert told[:kept] == [rank[run]["drawn"] for rank in before[:kept]]
        assert len({tuple(drawn) for drawn in told}) == len(told)


@pytest.mark.integration
def test_the_state_still_names_the_ranks_that_wrote_it(legs):
    assert [leg[0]["zero3"]["state"].world_size for leg in legs[1:]] == list(SIZES[:-1])
