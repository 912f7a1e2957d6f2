"""Saves of models of any make, loaded by any number of ranks."""

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from tests.checkpoint.ranks import full_moment, state_at
from tests.spawn import run_ranks
from unimo3.checkpoint.load import load, newest_good
from unimo3.checkpoint.save import save
from unimo3.distributed import world

DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool, "bfloat16": torch.bfloat16}


class Leaf(nn.Module):
    """One parameter."""

    def __init__(self, shape: list[int], trained: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.float() * x).square().sum()


class AnyModel(nn.Module):
    """Leaves of given shapes, some frozen, some tied to others; buffers of given types."""

    def __init__(self, example: dict[str, Any], seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.leaves = nn.ModuleList(Leaf(leaf["shape"], leaf["trained"]) for leaf in example["leaves"])
        for number, leaf in enumerate(example["leaves"]):
            if leaf["tied_to"] is not None:
                self.leaves[number].weight = self.leaves[leaf["tied_to"]].weight
        for number, (shape, dtype) in enumerate(example["buffers"]):
            values = torch.randint(2, shape) if dtype in ("int64", "bool") else torch.rand(shape)
            self.register_buffer(f"buffer_{number}", values.to(DTYPES[dtype]) + (seed if dtype == "int64" else 0))

    def forward(self, x: Tensor) -> Tensor:
        return sum((leaf(x) for leaf in self.leaves), torch.zeros(()))


def start(example: dict[str, Any], size: int, seed: int) -> Any:
    """An engine over it, with the example's stage, precision and parameter groups."""
    config = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": example["bf16"]},
        "zero_optimization": {
            "stage": example["stage"],
            "stage3_param_persistence_threshold": example["persistent"],
            "sub_group_size": example["sub_group"],
            "reduce_bucket_size": 64,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if example["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = AnyModel(example, seed)
    else:
        model = AnyModel(example, seed)
    groups: dict[int, list[nn.Parameter]] = {}
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        groups.setdefault(number % example["groups"], []).append(parameter)
    described = [{"params": group, "weight_decay": 0.1 * i, "lr": 0.01 * (1 + i + seed)} for i, group in groups.items()]
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(described), config=config)[0]


def values_of(engine: Any) -> dict[str, Any]:
    """All that training resumes from, gathered."""
    values: dict[str, Any] = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                values[f"half {name}"] = parameter.detach().clone()
        else:
            values[f"half {name}"] = parameter.detach().clone()
        if parameter.requires_grad and (parameter.numel() or hasattr(parameter, "ds_id")):
            values[f"fp32 {name}"] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                values[f"{key} {name}"] = full_moment(engine.optimizer, parameter, key)
    groups = engine.optimizer.optimizer.param_groups
    values["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    values["steps"] = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return values


def differences(folder: Path, example: dict[str, Any]) -> list[str]:
    """Save with the first number of ranks, load with the second; names of values that differ."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before, after = example["ranks"]
    run_ranks(before, _write, folder, example)
    return run_ranks(after, _read, folder, example)[0]


def _write(folder: Path, example: dict[str, Any]) -> None:
    engine = start(example, world()[1], seed=0)
    for step in range(2):
        loss = engine(torch.tensor(1.0 + step))
        engine.backward(loss)
        engine.step()
    values = values_of(engine)
    save(engine, folder / "run", state_at(2))
    if world()[0] == 0:
        torch.save(values, folder / "values.pt")


def _read(folder: Path, example: dict[str, Any]) -> list[str]:
    engine = start(example, world()[1], seed=1)
    newest = newest_good(folder / "run")
    if newest is None:
        return ["no good checkpoint"]
    load(engine, newest)
    actual, expected = values_of(engine), torch.load(folder / "values.pt", weights_only=False)
    names = sorted(actual.keys() | expected.keys())
    return [name for name in names if not _same(actual.get(name), expected.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)
