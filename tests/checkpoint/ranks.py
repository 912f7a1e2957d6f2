"""What ranks do for the checkpoint tests: train small ZeRO engines, save, load, and return their full weights."""

import random
import resource
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from tests.tiny import tiny_batch, tiny_config
from unimo3.checkpoint.load import load, newest_good
from unimo3.checkpoint.save import save
from unimo3.checkpoint.state import TrainState
from unimo3.distributed import barrier, world
from unimo3.errors import CheckpointError, UnreachableError
from unimo3.model.initialization import initialize_weights
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.ds_config import BatchPlan, read_ds_config
from unimo3.training.engine import build_engine, build_model
from unimo3.training.optim import OptimArgs

Weights = dict[str, Tensor]
# Runs by name: ZeRO stage, and whether in bf16 (else float32).
RUNS = {"bf16": (3, True), "fp32": (3, False), "zero2": (2, True), "zero1": (1, False)}


class OddModel(nn.Module):
    """Tied, frozen, odd-sized and one-element parameters, and buffers of each kind."""

    def __init__(self, seed: int):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.inner = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 7, bias=False)
        self.scale = nn.Parameter(torch.rand(1))
        self.decoder = nn.Linear(7, 11)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("count", torch.arange(3) + seed)
        self.register_buffer("shift", torch.rand(7))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.decoder.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.frozen(self.dropout(self.inner(self.embed(ids)).tanh())) * self.scale + self.shift
        return nn.functional.cross_entropy(self.decoder(states.to(self.decoder.bias.dtype)).float(), ids)


class OddTask(nn.Module):
    """Contains its model as the pretraining task does."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.model = OddModel(seed)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)


def start_engine(stage: int, bf16: bool, seed: int = 0, rows: int = 4, universal: bool = False, **zero: Any) -> Any:
    """An engine over `OddTask` with two parameter groups and, unless `zero` sets some, no persistent parameters."""
    size = world()[1]
    config = {
        "train_batch_size": rows * size,
        "train_micro_batch_size_per_gpu": rows,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 64,
            "sub_group_size": 40,
            **zero,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            task = OddTask(seed)
    else:
        task = OddTask(seed)
    decayed = [task.model.embed.weight, task.model.inner.weight]
    ids = {id(parameter) for parameter in decayed}
    plain = [p for p in task.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}]
    return deepspeed.initialize(model=task, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)[0]


def train(engine: Any, steps: range) -> list[float]:
    """Losses of some steps; each step's batch depends on step and rank alone, dropout on the generators."""
    losses = []
    for step in steps:
        ids = torch.randint(11, (4,), generator=torch.Generator().manual_seed(100 * step + world()[0]))
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full_weights(engine: Any) -> Weights:
    """Every parameter, gathered, and every persistent buffer: in float32 from the optimizer's copy if trained."""
    stage = engine.zero_optimization_stage()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and parameter.numel() + getattr(parameter, "ds_numel", 0):
            weights[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        elif stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    weights["model.count"] = engine.module.model.count.clone()
    weights["model.shift"] = engine.module.model.shift.clone()
    return weights


def state_at(step: int) -> TrainState:
    """A state with recognisable values."""
    return TrainState(step, 8 * step, "config", "index", world()[1], 8, {"note": "retained"})


def save_runs(root: Path) -> dict[str, Any]:
    """Save step 2 and step 4 of each of `RUNS`, train on to step 6; and save one step of a tiny UNIMO-3.

    Returns:
        For each run, the losses of steps 4 and 5 and the weights and moments at step 4.
    """
    results: dict[str, Any] = {}
    for name, (stage, bf16) in RUNS.items():
        engine = start_engine(stage, bf16)
        torch.manual_seed(7 + world()[0])
        train(engine, range(2))
        save(engine, root / name, state_at(2))
        train(engine, range(2, 4))
        save(engine, root / name, state_at(4))
        results[name] = {
            "weights": full_weights(engine),
            "moments": moments(engine),
            "losses": train(engine, range(4, 6)),
        }
    results["unimo"] = save_unimo(root / "unimo")
    return results


def save_unimo(run: Path) -> Tensor:
    """Train a tiny UNIMO-3 for one step as the pretraining program does, save it, and return what it computes."""
    rank, size = world()
    ds_config = read_ds_config("ds_configs/zero3_fp32.json", BatchPlan(4 * size, 4, size), clip_norm=1.0)
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config()))
    initialize_weights(model, 0, std=0.1)
    engine = build_engine(PretrainingLoss(model, ObjectivesArgs().build(0)), model, ds_config, OptimArgs(lr=1e-3))
    engine.backward(engine(tiny_batch(4, seed=rank))["loss"])
    engine.step()
    save(engine, run, state_at(1))
    if rank == 0:
        tiny_config().save_pretrained(run / "model")
    return unimo_output(model)


@torch.no_grad()
def unimo_output(model: Unimo3ForPreTraining) -> Tensor:
    """Text logits on a fixed batch."""
    batch = tiny_batch(2, seed=5)
    model.eval()
    output = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    return output.prediction_logits.clone()


def moments(engine: Any) -> list[Tensor]:
    """This rank's optimizer state, copied."""
    states = engine.optimizer.optimizer.state.values()
    return [value.clone() for entry in states for value in entry.values() if isinstance(value, Tensor)]


def load_run(run: Path, stage: int, bf16: bool) -> dict[str, Any]:
    """Load the newest good checkpoint into an engine that started from other weights, and train on from there."""
    engine = start_engine(stage, bf16, seed=99)
    torch.manual_seed(99)
    newest = newest_good(run)
    assert newest is not None
    state = load(engine, newest)
    weights, state_tensors = full_weights(engine), moments(engine)
    return {"state": state, "weights": weights, "moments": state_tensors, "losses": train(engine, range(4, 6))}


def load_runs(
    root: Path, damaged: list[Path], errors: Path, without_rank_1: Path, unanswered: list[Path]
) -> dict[str, Any]:
    """`load_run` for each of `RUNS`; which checkpoint is chosen in each damaged run; and `fail_to_save`.

    Args:
        without_rank_1: a checkpoint that rank 1 cannot load.
        unanswered: checkpoints of which the storage gives no answer for a file.
    """
    results: dict[str, Any] = {name: load_run(root / name, stage, bf16) for name, (stage, bf16) in RUNS.items()}
    results["chosen"] = [None if (newest := newest_good(run)) is None else newest.name for run in damaged]
    results["errors"] = fail_to_save(errors)
    try:
        load(start_engine(3, bf16=True, stage3_param_persistence_threshold=10), without_rank_1)
    except CheckpointError as error:
        results["one rank"] = str(error)
    results["unanswered"] = []
    for folder in unanswered:
        try:
            load(start_engine(3, bf16=True), folder)
        except UnreachableError as error:
            results["unanswered"].append(str(error))
    return results


def fail_to_save(root: Path) -> dict[str, Any]:
    """Save under errors of this machine on one rank; returns what each attempt raised and which files remain.

    Args:
        root: contains runs `full` and `vanished` with a good checkpoint each.
    """
    rank, _ = world()
    engine = start_engine(3, bf16=True)
    results: dict[str, Any] = {}

    def attempt(problem: str, run: Path) -> None:
        try:
            save(engine, run, state_at(9))
            results[problem] = None
        except CheckpointError as error:
            results[problem] = str(error)

    blocked = root / "blocked"
    if rank == 0:
        blocked.mkdir()
        (blocked / "checkpoints").write_text("a file where a folder is needed")
    attempt("blocked folder", blocked)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    attempt("full disk on rank 1", root / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def vanish(*_: Any) -> None:
        barrier()
        if rank == 0:
            shutil.rmtree(root / "vanished" / "checkpoints" / "step_00000009.tmp")
        barrier()

    hook = engine.module.register_state_dict_post_hook(vanish)
    attempt("vanished folder", root / "vanished")
    hook.remove()

    def half_vanish(*_: Any) -> None:
        # After rank 0 wrote its first file and before it writes its second.
        barrier()
        if rank == 0:
            next((root / "half").glob("checkpoints/*.tmp/zero_pp_rank_0_*")).unlink()

    engine.optimizer.state_dict, stock = (lambda: (half_vanish(), stock())[1]), engine.optimizer.state_dict
    attempt("vanished file", root / "half")
    engine.optimizer.state_dict = stock

    def run_out() -> None:
        raise MemoryError("no memory for a copy")

    if rank == 1:
        engine.optimizer.state_dict = run_out
    attempt("memory runs out on rank 1", root / "full")
    if rank == 1:
        engine.optimizer.state_dict = stock
    results["remains of failed saves"] = sorted(path.name for path in (root / "full" / "checkpoints").glob("*.tmp"))
    barrier()

    results["newest"] = [newest_good(root / name) for name in ("full", "vanished")]
    attempt("none", root / "full")
    results["newest after"] = newest_good(root / "full")
    train(engine, range(1))
    save(engine, root / "full", state_at(9))
    results["newest after the same step again"] = newest_good(root / "full")
    return results


def draw() -> list[float]:
    """The next of torch's, Python's and NumPy's generators, which stay as they are."""
    state, python, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    drawn = [torch.rand(1).item(), random.random(), float(np.random.rand())]  # noqa: NPY002
    torch.set_rng_state(state)
    random.setstate(python)
    np.random.set_state(numpy_state)  # noqa: NPY002
    return drawn


def every_value(engine: Any) -> dict[str, Any]:
    """Weights in both precisions, moments, steps, groups, counters: all that training resumes from."""
    optimizer = engine.optimizer
    values: dict[str, Any] = {f"fp32 {name}": value for name, value in full_weights(engine).items()}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            values[f"{key} {name}"] = full_moment(optimizer, parameter, key)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                values[f"half {name}"] = parameter.detach().clone()
        else:
            values[f"half {name}"] = parameter.detach().clone()
    values["steps"] = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    values["groups"] = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.optimizer.param_groups
    ]
    values["scale"] = (optimizer.loss_scaler.cur_scale, optimizer.dynamic_loss_scale, optimizer.overflow)
    values["counters"] = (engine.global_steps, engine.global_samples, engine.skipped_steps)
    return values


def full_moment(optimizer: Any, parameter: Any, key: str) -> Tensor:
    """A parameter's moment over all ranks."""
    if hasattr(parameter, "ds_id"):
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, key).clone()
    # DeepSpeed's call finds a ZeRO-2 moment after a step, and not after a load.
    full, mapping = torch.zeros(parameter.numel()), parameter._hp_mapping
    if mapping is not None:
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        local = optimizer.optimizer.state[flat][key].narrow(0, there.start, there.numel)
        full.narrow(0, here.start, here.numel).copy_(local)
    torch.distributed.all_reduce(full)
    return full.view_as(parameter)
