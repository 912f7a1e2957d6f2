"""Optimizer states on NVMe: trained, saved, and resumed with and without NVMe, as if they were in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.spawn import run_ranks
from tests.tiny import rows, tiny_batch, tiny_config
from unimo3.checkpoint.zero_reader import ZeroCheckpoint
from unimo3.distributed import sum_over_ranks, world

FOLDER = Path(__file__).parents[2] / "ds_configs"
ROWS = 8


def train(root: Path, name: str, steps: range, saves: bool = True) -> dict[str, Any]:
    """Begin or resume the run in `root` under a file of ds_configs/, train, and save after half of the steps."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from tests.checkpoint.ranks import state_at
    from unimo3.checkpoint.load import load, newest_good
    from unimo3.checkpoint.save import save
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss
    from unimo3.training.ds_config import BatchPlan, read_ds_config
    from unimo3.training.engine import build_engine, build_model
    from unimo3.training.optim import OptimArgs

    rank, size = world()
    swap_folder = root / f"{name}_{steps.start}"
    path, plan = str(FOLDER / f"{name}.json"), BatchPlan(ROWS, ROWS // size, size)
    ds_config = read_ds_config(path, plan, clip_norm=1.0, swap_folder=str(swap_folder))
    # Only pieces of 1 MiB and more are swapped, here the decayed weights of a large vocabulary.
    text = tiny_config().text_config.to_dict() | {"vocab_size": 40_000}
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config(text_config=text)))
    initialize_weights(model, steps.start, std=0.1)
    task = PretrainingLoss(model, ObjectivesArgs().build(seed=0))
    engine: Any = build_engine(task, model, ds_config, OptimArgs(lr=1e-3, fused="torch"))

    def values() -> dict[str, Tensor]:
        states = {}
        for name, parameter in model.named_parameters():
            states[name] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                states[f"{kind} {name}"] = safe_get_full_optimizer_state(parameter, kind).clone()
        return states

    result: dict[str, Any] = {"losses": []}
    if steps.start:
        newest = newest_good(root / "run")
        assert newest is not None
        load(engine, newest)
        result["loaded"] = values()
    for step in steps:
        loss = engine(rows(tiny_batch(ROWS, step), rank * ROWS // size, (rank + 1) * ROWS // size))["loss"]
        engine.backward(loss)
        engine.step()
        result["losses"].append(float(sum_over_ranks(loss.detach().float().reshape(1))) / size)
        if saves and step == steps.start + 1:
            result["files"] = sorted(path.name for path in swap_folder.rglob(f"rank{rank}/*.swp"))
            save(engine, root / "run", state_at(step + 1))
            result["saved"] = values()
    return result


def begin(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Four steps without NVMe, which save nothing, and with it."""
    steps = range(4)
    return train(root, "zero3_offload_cpu", steps, saves=False), train(root, "zero3_offload_nvme", steps)


@pytest.mark.integration
@pytest.mark.usefixtures("libaio")
def test_states_on_nvme_train_and_resume_as_states_in_memory(tmp_path):
    in_memory, begun = run_ranks(2, begin, tmp_path)[0]
    assert [name.split("-")[0] for name in begun["files"] if name.startswith("exp")] == ["exp_avg", "exp_avg_sq"]
    assert begun["losses"] == in_memory["losses"]

    resumed = run_ranks(2, train, tmp_path, "zero3_offload_nvme", range(2, 4))[0]
    assert resumed["losses"] == begun["losses"][2:]
    # Files are read by resumes on any number of ranks, also without NVMe, and by export.
    alone = run_ranks(1, train, tmp_path, "zero3_offload_cpu", range(4, 6))[0]
    for before, after in ((begun, resumed), (resumed, alone)):
        assert before["saved"].keys() == after["loaded"].keys()
        assert all(torch.equal(value, after["loaded"][name]) for name, value in before["saved"].items())
    source = ZeroCheckpoint(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert all(
        torch.equal(source.tensor(f"model.{name}"), resumed["saved"][name])
        for name in resumed["saved"]
        if " " not in name
    )
