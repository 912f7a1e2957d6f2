"""The planned memory of a rank against what a running DeepSpeed engine allocates."""

from pathlib import Path

import pytest

from tests.spawn import run_ranks
from tests.tiny import rows, tiny_batch, tiny_config
from unimo3.training.ds_config import BatchPlan, read_ds_config
from unimo3.training.engine import build_engine, build_model
from unimo3.training.optim import OptimArgs
from unimo3.training.plan.memory import Sharding, model_sizes, rank_memory
from unimo3.training.plan.step_trace import build_on_meta

FOLDER = Path(__file__).parents[2] / "ds_configs"
# What is run: a file of ds_configs/, and changes to its ZeRO section.
RUNS = {
    "zero3_fp32": ("zero3_fp32", {}),
    "zero3_bf16": ("zero3_bf16", {}),
    "zero3_hpz": ("zero3_hpz", {"zero_hpz_partition_size": 2}),
    "zero3_offload_cpu": ("zero3_offload_cpu", {}),
    "zero2_bf16": ("zero2_bf16", {}),
    "zero1_bf16": ("zero2_bf16", {"stage": 1}),
}
NUM_RANKS = 2


def ds_config_of(name):
    file, changes = RUNS[name]
    config = read_ds_config(str(FOLDER / f"{file}.json"), BatchPlan(8, 4, NUM_RANKS), clip_norm=0.0)
    # Bounds of this model's size: 160,883 parameters, 6,144 of them in the largest module.
    bounds = {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 1_000}
    bounds |= {"stage3_max_live_parameters": 40_000, "stage3_max_reuse_distance": 16_000}
    # Some are persistent, not all as by default.
    config["zero_optimization"] |= bounds | {"stage3_param_persistence_threshold": 100} | changes
    return config


def num_bytes(tensors) -> int:
    """Bytes of tensors' elements; those that share memory count once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def held_by_an_engine(name):
    """Bytes by kind on this rank, in the last of some steps."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from unimo3.distributed import world
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    rank = world()[0]
    ds_config = ds_config_of(name)
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config()))
    initialize_weights(model, 0, std=0.1)
    engine = build_engine(PretrainingLoss(model, ObjectivesArgs().build(seed=0)), model, ds_config, OptimArgs())
    optimizer, parameters = engine.optimizer, list(model.parameters())
    most = {"gathered_weights": 0, "secondary_weights": 0}

    not_persistent = [p for p in parameters if not getattr(p, "ds_persist", True)]

    def note_gathered(*_):  # thousands of times
        gathered = sum(p.ds_numel for p in not_persistent if p.ds_status is ZeroParamStatus.AVAILABLE)
        most["gathered_weights"] = max(most["gathered_weights"], gathered * parameters[0].element_size())
        copies = [p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None]
        if copies:
            most["secondary_weights"] = max(most["secondary_weights"], num_bytes(copies))

    for module in model.modules() if Sharding(ds_config).stage == 3 else []:
        module.register_forward_hook(note_gathered)
        module.register_full_backward_hook(note_gathered)
    for seed in range(3):  # the first is watched for the order of modules, the second repeats it
        most.update(dict.fromkeys(most, 0))
        loss = engine(rows(tiny_batch(8, seed), rank * 4, rank * 4 + 4))["loss"]
        engine.backward(loss)
        averaged = getattr(optimizer, "averaged_gradients", {})  # stage 2 has them between the two calls
        averaged = [part for parts in averaged.values() for part in parts or []]
        engine.step()
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for key, value in state.items()
        if key.startswith("exp_avg")
    ]
    allocated = {"moments": num_bytes(moments), **most}
    if Sharding(ds_config).stage == 3:
        weights = [parameter.ds_tensor for parameter in parameters]
        masters = optimizer.fp32_partitioned_groups_flat
        taken = {tensor.data_ptr() for tensor in weights}
        allocated["weights"] = num_bytes(weights)
        allocated["master_weights"] = num_bytes(tensor for tensor in masters if tensor.data_ptr() not in taken)
        allocated["gradients"] = num_bytes([optimizer.grad_partitions_flat_buffer])
        allocated["gradients"] += num_bytes([tensor.grad for tensor in masters if tensor.grad is not None])
        allocated["persistent_weights"] = (
            sum(p.ds_numel for p in parameters if p.ds_persist) * parameters[0].element_size()
        )
    elif name == "zero1_bf16":
        allocated["weights"] = num_bytes(optimizer.bf16_groups_flat)
        allocated["master_weights"] = num_bytes(optimizer.fp32_groups_flat_partition)
        allocated["gradients"] = num_bytes(optimizer.fp32_groups_gradients_flat)
    else:
        allocated["weights"] = num_bytes(optimizer.bit16_groups_flat)
        allocated["master_weights"] = num_bytes(optimizer.single_partition_of_fp32_groups)
        allocated["gradients"] = num_bytes(averaged)
    return allocated


def held_under_each_ds_config():
    return {name: held_by_an_engine(name) for name in RUNS}


@pytest.fixture(scope="session")
def allocated():
    return run_ranks(NUM_RANKS, held_under_each_ds_config)


def planned(name):
    sizes = model_sizes(build_on_meta(tiny_config()))
    return rank_memory(sizes, Sharding(ds_config_of(name)), NUM_RANKS)


@pytest.mark.integration
@pytest.mark.parametrize("name", RUNS)
def test_a_running_engine_uses_the_planned_memory(allocated, name):
    memory = planned(name)
    expected = memory.device | memory.host | memory.pass_bytes
    kinds = set(expected) - {"gathered_weights", "buckets"}
    assert {"weights", "moments"} < kinds
    for rank in range(NUM_RANKS):
        for kind in kinds:
            assert expected[kind] == pytest.approx(allocated[rank][name][kind], rel=0.02), (rank, kind)


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("zero3")])
def test_no_more_is_gathered_than_was_planned(allocated, name):
    expected = planned(name).pass_bytes["gathered_weights"]
    for rank in range(NUM_RANKS):
        assert 0.8 * expected < allocated[rank][name]["gathered_weights"] <= expected
