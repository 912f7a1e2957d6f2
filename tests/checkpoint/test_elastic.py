"""Runs that change their number of ranks: 2 -> 1 -> 3 -> 4 -> 2, every value compared at every change."""

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.elastic_ranks import ELASTIC_RUNS, elastic_leg, load_universal, structure_read_together
from tests.commands import start_command
from tests.spawn import run_ranks
from tests.waiting import text_of, wait_for_end
from unimo3.checkpoint import store

SIZES = (2, 1, 3, 4, 2)
# Sums over ranks are taken in another order, in bf16 of rounded terms.
TOLERANCE = {"zero3": 5e-3, "zero3 fp32": 1e-6, "zero2": 5e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def legs(root: Path) -> list[list[dict[str, Any]]]:
    """What each rank of each leg reports."""
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
def test_each_file_is_opened_for_its_structure_by_one_rank(legs, root, run):
    # Of four ranks: four optimizer files, and under ZeRO-3 as many model files.
    (folder,) = [path for path in store.list_checkpoints(root / run) if store.step_of(path) == 8]
    alone = run_ranks(1, structure_read_together, folder)[0]
    together = run_ranks(3, structure_read_together, folder)
    num_files = len(list(folder.glob("*_states.pt")))
    # Rank 0 reads the first pair once more, for what all ranks' files have alike.
    assert sum(count for count, _ in together) == num_files + 2 == alone[0]
    assert max(count for count, _ in together) <= 2 + 2 * 2
    for _, values in together:
        assert values.keys() == alone[1].keys()
        assert all(torch.equal(value, alone[1][name]) for name, value in values.items())


@pytest.mark.integration
@pytest.mark.parametrize("run", ELASTIC_RUNS)
def test_ranks_together_read_each_trained_value_once(legs, run):
    saved = legs[0][0][run]["saved"]
    # Float32 weights, and two moments of each.
    numbers = {name.removeprefix("fp32 "): 3 * v.numel() for name, v in saved.items() if name.startswith("fp32 ")}
    for leg in legs[1:]:
        total = Counter()
        for rank in leg:
            total.update(rank[run]["num_read"])
        trained = {name: count for name, count in total.items() if "frozen" not in name}
        assert trained
        assert trained == {name: numbers[name] for name in trained}


@pytest.mark.integration
@pytest.mark.parametrize("run", ELASTIC_RUNS)
def test_the_compared_values_were_trained(legs, run):
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
def test_generators_continue_and_new_ranks_get_new_ones(legs, run):
    for before, after in itertools.pairwise(legs):
        results = [rank[run]["drawn at first"] for rank in after]
        num_common = min(len(before), len(after))
        assert results[:num_common] == [rank[run]["drawn"] for rank in before[:num_common]]
        assert len({tuple(drawn) for drawn in results}) == len(results)


@pytest.mark.integration
def test_an_order_of_parameters_that_deepspeed_chose_is_refused(legs):
    results = legs[1][0]["zero2"]["round robin"]
    assert "not supported with round_robin_gradients" in results
    assert results.endswith("start with 2 ranks, or set it to false)")


@pytest.mark.integration
def test_the_state_still_names_the_ranks_that_wrote_it(legs):
    assert [leg[0]["zero3"]["state"].world_size for leg in legs[1:]] == list(SIZES[:-1])


@pytest.mark.integration
def test_deepspeeds_conversion_loses_what_this_one_preserves(legs, root, tmp_path):
    flags = [
        "--input_folder",
        store.folder_of(root / "zero3") / "step_00000002",
        "--output_folder",
        tmp_path / "universal",
    ]
    log = tmp_path / "log"
    command = ("deepspeed.checkpoint.ds_to_universal", [*flags, "--inject_missing_state"])
    conversion = start_command(*command, os.environ, log)
    wait_for_end(conversion, "the conversion", text_of(log))
    assert conversion.exitcode == 0, log.read_text()
    before, after = legs[0][0]["zero3"]["saved"], run_ranks(1, load_universal, tmp_path / "universal")[0]
    different = {
        name
        for name, value in before.items()
        if not (value.equal(after[name]) if isinstance(value, torch.Tensor) else value == after[name])
    }
    assert different >= {"fp32 model.frozen.weight", "groups"}
    assert different & {"fp32 model.count", "fp32 model.shift"}
