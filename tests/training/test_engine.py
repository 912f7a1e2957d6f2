"""DeepSpeed configurations: each loads, those a CPU can run train, and ranks agree under all of them."""

import json
import math
from pathlib import Path

import pytest

from tests.spawn import run_ranks
from tests.tiny import rows, tiny_batch, tiny_config
from unimo3.training.engine import BatchPlan, build_engine, build_model, gradient_norm, read_ds_config
from unimo3.training.optim import OptimArgs

FOLDER = Path(__file__).parents[2] / "ds_configs"
ON_CPU = ("zero2_bf16", "zero3_bf16", "zero3_fp32", "zero3_offload_cpu")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_ds_config_loads_in_deepspeed(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    filled = read_ds_config(str(path), BatchPlan(global_batch=64, micro_batch=8, world_size=1), clip_norm=1.0)
    loaded = DeepSpeedConfig(filled)
    assert (loaded.train_batch_size, loaded.train_micro_batch_size_per_gpu) == (64, 8)
    assert loaded.gradient_accumulation_steps == 8
    assert loaded.zero_config.stage == (2 if "zero2" in path.stem else 3)
    assert loaded.bfloat16_config.enabled == ("bf16" in path.stem or path.stem in ("zero3_offload_cpu", "zero3_hpz"))


def test_a_ds_config_has_no_key_deepspeed_does_not_know():
    # DeepSpeed drops unknown keys of its ZeRO section silently; its model lists those it knows.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    for path in FOLDER.glob("*.json"):
        assert set(json.loads(path.read_text())["zero_optimization"]) <= known, path.name


def losses_under_each_config():
    from unimo3.distributed import world
    from unimo3.model.init import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingTask
    from unimo3.objectives.exchange import sum_over_ranks

    rank, size = world()
    share = 8 // size
    found = {}
    for name in ON_CPU:
        # No clipping: DeepSpeed sums the norm of offloaded gradients in another order, and a norm that differs in its
        # last bit scales every gradient differently. Whole runs in tests/integration clip.
        ds_config = read_ds_config(str(FOLDER / f"{name}.json"), BatchPlan(8, share, size), clip_norm=0.0)
        model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config()))
        initialize_weights(model, 0, std=0.1)
        task = PretrainingTask(model, ObjectivesArgs().build(seed=0))
        engine = build_engine(task, model, ds_config, OptimArgs(lr=1e-3))
        losses = []
        for seed in range(4):
            report = engine(rows(tiny_batch(8, seed), rank * share, (rank + 1) * share))
            engine.backward(report["loss"])
            engine.step()
            assert math.isfinite(gradient_norm(engine))
            losses.append(float(sum_over_ranks(report["loss"].detach().reshape(1))) / size)
        found[name] = losses
    return found


@pytest.mark.integration
def test_two_ranks_agree_under_each_config_and_configs_with_each_other():
    (alone,) = run_ranks(1, losses_under_each_config)
    first, second = run_ranks(2, losses_under_each_config)
    assert first == second
    for name in ON_CPU:
        # float32: order of sums; bf16: 8 bits of mantissa.
        tolerance = 1e-5 if name == "zero3_fp32" else 0.02
        assert first[name] == pytest.approx(alone[name], rel=tolerance), name
        assert first[name] == pytest.approx(alone["zero3_fp32"], rel=0.03), name
    assert first["zero3_bf16"] == first["zero3_offload_cpu"]


def test_the_batch_plan():
    assert BatchPlan(4096, 64, 8).num_accumulation == 8
    assert BatchPlan(4096, 64, 8).faults() == []
    assert BatchPlan(100, 8, 4).faults()[0].startswith("training.global_batch: 100: does not divide")
    assert "use 96 or 128" in BatchPlan(100, 8, 4).faults()[0]
    assert len(BatchPlan(0, -1, 4).faults()) == 2
