"""What ranks do in the tests of parts that do not train, and of rates by layer."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.checkpoint.ranks import state_at
from tests.tiny import rows, tiny_batch, tiny_config
from unimo3.checkpoint.load import load, newest_good
from unimo3.checkpoint.save import save
from unimo3.distributed import sum_over_ranks, world
from unimo3.kernels.args import KernelArgs
from unimo3.model.initialization import initialize_weights
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.args import OptimArgs
from unimo3.training.ds_config import BatchPlan, read_ds_config
from unimo3.training.engine import build_engine, build_model, prepare_layers

FOLDER = Path(__file__).parents[2] / "ds_configs"
# The file of ds_configs/, and its stage.
STAGES = {"zero1": ("zero2_bf16", 1), "zero2": ("zero2_bf16", 2), "zero3": ("zero3_fp32", 3)}
ROWS = 8


def start(stage: str, optim: OptimArgs, seed: int = 0) -> Any:
    """An engine over a tiny model."""
    file, number = STAGES[stage]
    micro_batch = ROWS // world()[1]
    ds_config = read_ds_config(str(FOLDER / f"{file}.json"), BatchPlan(ROWS, micro_batch, world()[1]), clip_norm=1.0)
    ds_config["zero_optimization"]["stage"] = number
    if number == 3:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config(bridge=True, num_hidden_layers=2)))
    initialize_weights(model, seed, std=0.1)
    prepare_layers(model, KernelArgs(), activation_checkpointing=number == 3, compile_towers=False)
    return build_engine(PretrainingLoss(model, ObjectivesArgs().build(seed=0)), model, ds_config, optim)


def train(engine: Any, steps: range) -> list[float]:
    """Mean losses over all ranks; a step's rows are the same at any number of ranks."""
    rank, size = world()
    losses = []
    for step in steps:
        loss = engine(rows(tiny_batch(ROWS, step), rank * ROWS // size, (rank + 1) * ROWS // size))["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(float(sum_over_ranks(loss.detach().float().reshape(1))) / size)
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter as the forward pass reads it."""
    from deepspeed import zero

    values = {}
    for name, parameter in engine.module.model.named_parameters():
        with zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
    return values


def rates(engine: Any) -> dict[str, float]:
    """The peak rate of each group of the optimizer."""
    return {group["name"]: group["peak_lr"] for group in engine.optimizer.optimizer.param_groups}


def begin_frozen(root: Path, optim: OptimArgs) -> dict[str, Any]:
    """Under each stage, train two steps and save, then train two more."""
    results = {}
    for stage in STAGES:
        engine = start(stage, optim)
        results[stage] = {"before": weights(engine)}
        train(engine, range(1))
        results[stage]["first"] = weights(engine)
        train(engine, range(1, 2))
        save(engine, root / stage, state_at(2))
        results[stage]["saved"] = weights(engine)
        results[stage]["rates"] = rates(engine)
        results[stage]["losses"] = train(engine, range(2, 4))
    return results


def resume_frozen(root: Path, optim: OptimArgs) -> dict[str, Any]:
    """Load what `begin_frozen` saved into engines with other weights, and train the last two steps."""
    results = {}
    for stage in STAGES:
        if stage == "zero1" and world()[1] == 1:
            continue  # another number of ranks is refused
        engine = start(stage, optim, seed=5)
        newest = newest_good(root / stage)
        assert newest is not None
        load(engine, newest)
        results[stage] = {"loaded": weights(engine), "rates": rates(engine)}
        results[stage]["losses"] = train(engine, range(2, 4))
    return results
