"""The planner's metrics against formulas done by hand and real runs on the CPU."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from pretrain import plan
from tests.saved_tensors import bytes_saved_by_a_step
from tests.tiny import tiny_batch, tiny_config, tiny_pretraining_model
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.objectives.args import ItcArgs, ItmArgs, MlmArgs, ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.args import OptimArgs
from unimo3.training.ds_config import BatchPlan
from unimo3.training.plan.estimate import Machine, choose, fit, unsuited
from unimo3.training.plan.memory import ModelSizes, Sharding, model_sizes, rank_memory
from unimo3.training.plan.network import Traffic, network_s, step_traffic
from unimo3.training.plan.offload_traffic import offload_traffic
from unimo3.training.plan.settings import Fabric
from unimo3.training.plan.step_trace import StepCost, build_on_meta, trace_step

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pretrain" / "recipes"
TOKENS = 10
PLUS_PLUS = "zero3_zeropp_fp16"

FP32, BF16 = torch.float32, torch.bfloat16
CUT_IN_3 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 3}}


def ds_config(name):
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


def step(config, objectives, tokens=TOKENS, freeze=(), **kernels):
    return plan.pretraining_step(config, objectives, tokens, KernelArgs(**kernels), OptimArgs(freeze=list(freeze)))


def trace(config=None, objectives=None, tokens=TOKENS, dtype=FP32, checkpointing=False) -> StepCost:
    return trace_step(step(config or tiny_config(), objectives or ObjectivesArgs(), tokens), dtype, checkpointing)


def test_base_without_bridges_has_327146300_parameters_tied_ones_once():
    recipe = plan.recipe_of(plan.parse_settings(["--config", str(RECIPES / "base.yaml"), "--model.bridge", "false"]))
    sizes = model_sizes(build_on_meta(recipe.model))
    assert sizes.total == sum(sizes.parameters) == 327_146_300
    # The MLM decoder's weight is the text tower's.
    assert sizes.roles["text"] > 50265 * 768 > sizes.roles["heads"]


def attention_by_hand(queries, keys, size) -> int:
    return 2 * 2 * queries * keys * size  # scores, and weights times values


def tower_flops_by_hand(config, tokens) -> tuple[int, int]:
    """Operations of the text tower for a text, and of the image tower for an image."""
    text, vision = config.text_config, config.vision_config.overrides
    patch, image_width = vision["patch_size"], vision["embed_dim"]
    patches = (config.vision_config.image_size // patch) ** 2

    def layer(tokens, size, inner):
        return 2 * tokens * (4 * size * size + 2 * size * inner) + attention_by_hand(tokens, tokens, size)

    image = 2 * patches * 3 * patch * patch * image_width
    image += vision["depth"] * layer(patches + 1, image_width, 4 * image_width)
    return text.num_hidden_layers * layer(tokens, text.hidden_size, text.intermediate_size), image


def itc_head_flops_by_hand(config) -> int:
    return 2 * (config.text_config.hidden_size + config.vision_config.overrides["embed_dim"]) * config.itc_size


def forward_flops_by_hand(config, tokens, masked_tokens) -> float:
    """A pair's operations with all objectives, random negatives and layers that see their partner alone."""
    text, width, layers = config.text_config, config.hidden_size, config.num_hidden_layers
    vision = config.vision_config.overrides
    image_width = vision["embed_dim"]
    image_tokens = (config.vision_config.image_size // vision["patch_size"]) ** 2 + 1

    def fusion_layer(tokens, other):
        linear = (4 + 2) * width * width + 2 * width * config.intermediate_size
        cross = 2 * other * 2 * width * width + attention_by_hand(tokens, other, width)
        return 2 * tokens * linear + attention_by_hand(tokens, tokens, width) + cross

    twice, once = tower_flops_by_hand(config, tokens)
    twice += 2 * (tokens * text.hidden_size + image_tokens * image_width) * width
    twice += layers * (fusion_layer(tokens, image_tokens) + fusion_layer(image_tokens, tokens))
    heads = 2 * 2 * width * width + 2 * 2 * width * 2  # pooler and ITM
    heads += 2 * masked_tokens * width * (width + text.vocab_size)
    return once + 2 * twice + heads + itc_head_flops_by_hand(config)


def test_operations_are_those_counted_by_hand():
    config = tiny_config(interaction="in_layer")
    by_hand = forward_flops_by_hand(config, TOKENS, masked_tokens=0.15 * (TOKENS - 2))
    cost = trace(config)
    # By hand without the contrast, which grows with the square of the batch.
    assert cost.forward_flops == pytest.approx(by_hand, rel=0.005)
    assert cost.backward_flops == pytest.approx(2 * by_hand, rel=0.05)


CONTRASTS_STEP = ObjectivesArgs(itc=ItcArgs(over="step"))


def test_contrast_over_the_step_runs_towers_and_its_head_once_more():
    config = tiny_config()
    text, image = tower_flops_by_hand(config, TOKENS)
    batch = 64  # of the trace, each of which meets all in two directions: forward, and two products backward
    contrast = 2 * 3 * 2 * batch * config.itc_size
    plain, over_step = trace(), trace(objectives=CONTRASTS_STEP)
    assert plain.prepare_flops == plain.prepared_bytes == 0
    assert over_step.prepare_flops == 2 * text + image + itc_head_flops_by_hand(config) + contrast
    assert over_step.forward_flops == plain.forward_flops
    # In float32 the gradients of two features, and the pair's loss.
    assert over_step.prepared_bytes == (2 * config.itc_size + 1) * 4
    assert over_step.saved_bytes == pytest.approx(plain.saved_bytes, rel=0.01)
    assert over_step.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.01)


def test_a_pass_before_micro_steps_counts_if_there_are_several():
    cost = StepCost(1e9, 2e9, 900_000, peak_bytes=1e6, fixed_bytes=5e3, prepare_flops=5e8, prepared_bytes=100.0)
    assert cost.activation_bytes(4, rank_batch=12) == 4 * 1e6 + 5e3 + 12 * 100
    assert cost.activation_bytes(12, rank_batch=12) == 12 * 1e6 + 5e3
    assert (cost.prepare_flops_with(4, 12), cost.prepare_flops_with(12, 12)) == (5e8, 0)


def test_the_mlm_head_runs_on_masked_tokens_alone():
    few, many = (trace(objectives=ObjectivesArgs(mlm=MlmArgs(probability=probability))) for probability in (0.25, 0.5))
    config, further = tiny_config(), 0.25 * (TOKENS - 2)
    width = config.hidden_size
    assert many.forward_flops - few.forward_flops == 2 * further * width * (width + config.text_config.vocab_size)


def test_each_further_objective_costs_operations():
    only_itc = trace(objectives=ObjectivesArgs(mlm=MlmArgs(weight=0), itm=ItmArgs(weight=0)))
    no_itm = trace(objectives=ObjectivesArgs(itm=ItmArgs(weight=0)))
    random = trace()
    hard = trace(objectives=ObjectivesArgs(itm=ItmArgs(negatives="hard"), itc=ItcArgs()))
    assert only_itc.flops < no_itm.flops < random.flops < hard.flops
    # Random: the fusion encoder reads MLM's and ITM's pair; hard: MLM's and three of ITM's.
    towers = 2 * no_itm.forward_flops - random.forward_flops
    assert hard.forward_flops - towers == pytest.approx(2 * (random.forward_flops - towers), rel=0.15)


@pytest.mark.parametrize(
    "changes",
    [
        {"interaction": "in_layer"},
        {},
        {"bridge": True, "num_hidden_layers": 2},
        {"num_attention_heads": 1, "num_hidden_layers": 2},
    ],
)
def test_activations_are_those_a_real_step_saves(changes):
    model = tiny_pretraining_model(**changes)
    # What a GPU runs: Triton's kernels (interpreted here) for heads 32 wide, plain operations for those of 16.
    model.unimo3.use_attention_kernel("triton" if "num_attention_heads" in changes else "reference")
    task = PretrainingLoss(model, ObjectivesArgs().build(0)).train()
    few = 8 if "num_attention_heads" in changes else 32  # the interpreter takes its time
    measured = (bytes_saved_by_a_step(task, tiny_batch(2 * few)) - bytes_saved_by_a_step(task, tiny_batch(few))) / few
    # tiny_batch masks 1.5 of 10 tokens.
    objectives = ObjectivesArgs(mlm=MlmArgs(probability=1.5 / (TOKENS - 2)))
    assert trace(tiny_config(**changes), objectives).saved_bytes == pytest.approx(measured, rel=0.03)


def test_no_matrix_of_tokens_by_tokens_is_saved():
    def with_side(side):
        vision = {"image_size": side, "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}}
        return trace(tiny_config(vision_config=vision)).saved_bytes

    small, medium, large = with_side(64), with_side(128), with_side(256)  # 64, 256 and 1024 patches
    assert large - medium == pytest.approx(4 * (medium - small), rel=0.01)


def test_the_reference_saves_attention_weights_and_the_kernels_do_not():
    config = tiny_config(num_attention_heads=1)
    with_kernels = trace(config)
    without = trace_step(step(config, ObjectivesArgs(), cross_layer_attention="reference"), FP32, False)
    image_tokens, passes = (16 // 8) ** 2 + 1, 2  # MLM's and ITM's
    levels, streams = 1 + 2 + 3, 2
    weights = passes * streams * levels * TOKENS * image_tokens * 4
    # The softmax's result and its product with the gate; the kernels keep a log-sum-exp instead.
    assert without.saved_bytes - with_kernels.saved_bytes > weights


def test_half_precision_saves_about_half_the_bytes():
    assert 0.45 < trace(dtype=BF16).saved_bytes / trace().saved_bytes < 0.6


def test_dropout_saves_one_byte_an_element():
    changes = {"hidden_dropout_prob": 0.1}
    without, dropping = trace(tiny_config()), trace(tiny_config(**changes))
    patches = (16 // 8) ** 2
    # Three a layer and stream, over the pairs of MLM and ITM.
    masks = 2 * 3 * tiny_config().num_hidden_layers * (TOKENS + patches + 1) * 32
    assert dropping.saved_bytes - without.saved_bytes == pytest.approx(masks, rel=0.01)


def test_checkpointing_saves_fewer_activations_and_computes_layers_twice():
    plain, checkpointed = trace(), trace(checkpointing=True)
    assert checkpointed.saved_bytes < plain.saved_bytes / 3
    assert checkpointed.saved_bytes < checkpointed.peak_bytes < plain.peak_bytes
    assert checkpointed.forward_flops == plain.forward_flops
    again = checkpointed.backward_flops - plain.backward_flops
    assert 0.7 * plain.forward_flops < again <= plain.forward_flops


def test_frozen_parts_have_neither_gradients_nor_optimizer_state():
    freeze = ["text_tower", "vision_tower", "fusion"]
    frozen_step = step(tiny_config(), ObjectivesArgs(), freeze=freeze)
    sizes, all_sizes = model_sizes(frozen_step.build(), frozen_step.optim), model_sizes(build_on_meta(tiny_config()))
    assert (sizes.total, sizes.roles) == (all_sizes.total, all_sizes.roles)
    trained = sum(map(sum, sizes.groups))
    assert trained == sizes.roles["heads"] == sizes.total - sum(sizes.frozen)
    for stage in (2, 3):
        sharding = Sharding(CUT_IN_3 | {"zero_optimization": {"stage": stage}})
        memory, of_all = rank_memory(sizes, sharding, 1), rank_memory(all_sizes, sharding, 1)
        assert memory.device["weights"] == pytest.approx(of_all.device["weights"], abs=8)
        assert memory.device["moments"] == pytest.approx(8 * trained, abs=32)
        assert memory.device["gradients"] == pytest.approx(4 * trained, abs=32)
    # The heads' own gradients, and no gradient of anything below them.
    cost, full = trace_step(frozen_step, FP32, False), trace()
    assert cost.forward_flops == full.forward_flops
    assert cost.backward_flops < 0.1 * full.backward_flops
    assert cost.saved_bytes < 0.2 * full.saved_bytes


SIZES = ModelSizes({"all": 10_000_000}, [[6_000_000, 3_000_000], [999_000, 1_000]], largest_module=6_000_000)


def memory(config, num_ranks=4):
    return rank_memory(SIZES, Sharding(config), num_ranks)


def test_more_ranks_need_less_memory_each():
    one, four = memory(CUT_IN_3, 1), memory(CUT_IN_3, 4)
    for name in ("weights", "master_weights", "moments", "gradients"):
        assert four.device[name] == pytest.approx(one.device[name] / 4)
    two = memory(ds_config("zero2_bf16"), 4)
    assert two.device["weights"] == 2 * SIZES.total
    assert two.device["moments"] == four.device["moments"]


def test_offloaded_state_is_host_memory():
    needed = memory(ds_config("zero3_offload_cpu"))
    assert not any(needed.device[name] for name in needed.device if name != "persistent_weights")
    assert needed.host["moments"] == 8 * SIZES.total / 4
    assert needed.step_bytes == 0


def test_states_on_nvme_leave_buffers_and_gradients_in_memory():
    config = ds_config("zero3_offload_nvme")
    config["zero_optimization"] |= {"sub_group_size": 1_000_000, "stage3_param_persistence_threshold": 0}
    needed, on_host = memory(config), memory(ds_config("zero3_offload_cpu")).host
    # Of four ranks: pieces of 1.5, 0.75 and 0.25 million elements, of which the last is too small for a file.
    assert needed.nvme == {"master_weights": 9_000_000, "moments": 18_000_000, "gradients": 9_000_000}
    assert needed.host["swap_buffers"] == 4 * 1_500_000 * 4
    assert needed.host["weights"] == on_host["weights"]
    assert needed.host["moments"] == 8 * 250_000
    assert needed.host["gradients"] == 4 * 2_500_000 + 4 * 250_000
    assert needed.step_bytes == 9_000_000


def test_traffic_of_offloaded_state_is_counted():
    def moved(name):
        config = ds_config(name)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return offload_traffic(SIZES, Sharding(config), num_micro_steps=2, num_ranks=16)

    # Two micro-steps: weights twice for each and back once, float32 gradients for each.
    in_memory = (2 * 2 * 2 + 2 + 2 * 4) * SIZES.total / 16
    assert moved("zero3_offload_cpu") == {"host": in_memory, "nvme": 0}
    assert moved("zero3_offload_nvme") == {"host": in_memory, "nvme": 2 * 16 * 9_000_000 / 16}
    assert moved("zero3_bf16") == {"host": 0, "nvme": 0}


def test_an_unknown_type_of_accumulation_is_named():
    assert Sharding(CUT_IN_3 | {"data_types": {"grad_accum_dtype": "float32"}}).gradient_bytes == 4
    with pytest.raises(ConfigError, match="grad_accum_dtype': 'fp31'"):
        Sharding(CUT_IN_3 | {"data_types": {"grad_accum_dtype": "fp31"}})


def test_a_secondary_copy_is_cut_among_its_group():
    needed = memory(ds_config("zero3_hpz"), 16)
    assert needed.pass_bytes["secondary_weights"] == 2 * 9_999_000 / 8  # one parameter is persistent


def test_what_is_gathered_is_bounded_by_the_ds_config():
    bounds = {"stage3_max_live_parameters": 2_000_000, "stage3_max_reuse_distance": 2_500_000}
    config = CUT_IN_3 | {"zero_optimization": {"stage": 3, **bounds}}
    assert memory(CUT_IN_3).pass_bytes["gathered_weights"] == 2 * (SIZES.total - 1_000)  # one is persistent
    assert memory(config).pass_bytes["gathered_weights"] == 2 * (2_000_000 + 6_000_000)


def chosen(gpu_memory_bytes, micro_batch=8, num_gpus=16, global_batch=256, contrasts=False):
    machine = Machine(num_gpus, gpu_memory_bytes, reserve=0.0, peak_flops={"bf16": 1e12}, utilization=0.5)
    cost = StepCost(1e9, 2e9, saved_bytes=900_000, peak_bytes=1e6, fixed_bytes=0.0)
    batch = BatchPlan(global_batch, micro_batch, num_gpus, contrasts)
    names = ("zero2_bf16", "zero3_bf16", "zero3_hpz", "zero3_offload_nvme", "zero3_offload_cpu")
    small = {"reduce_bucket_size": 100_000, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    shardings = {name: ds_config(name) for name in names}
    for config in shardings.values():
        config["zero_optimization"] |= small
    fits = [fit(name, Sharding(config), SIZES, cost, batch, machine) for name, config in shardings.items()]
    return choose(fits, batch, machine)


def test_the_ds_config_with_the_least_traffic_is_chosen_offloading_last():
    enough = int(chosen(80_000_000).fit.needed_bytes)
    choices = [chosen(size) for size in range(enough, enough - 15_000_000, -100_000)]
    taken = [choice.fit.name for choice in choices if choice.fit.fits]
    in_order = [name for index, name in enumerate(taken) if index == 0 or taken[index - 1] != name]
    assert in_order == ["zero2_bf16", "zero3_hpz", "zero3_bf16", "zero3_offload_cpu"]


def test_reasons_name_every_file():
    reasons = chosen(80_000_000).reasons
    assert reasons["zero2_bf16"].startswith("fits")
    assert "every pass" in reasons["zero3_bf16"]
    assert "host" in reasons["zero3_offload_cpu"]
    assert "NVMe" in reasons["zero3_offload_nvme"]


def test_the_micro_batch_is_the_recipes_or_the_largest_that_divides():
    assert chosen(80_000_000, micro_batch=8).micro_batch == 8
    # 256 pairs on 16 ranks: 16 a rank, of which 3 do not divide.
    choice = chosen(30_000_000, micro_batch=3)
    assert not choice.fit.fits
    assert 16 % choice.micro_batch == 0
    assert choice.micro_batch == choice.fit.largest_dividing


def test_too_little_memory_for_one_pair_is_an_error_with_the_fix():
    with pytest.raises(ConfigError, match="not even a micro-batch of one pair fits") as error:
        chosen(1_000_000)
    assert "activation_checkpointing" in str(error.value)


@pytest.mark.parametrize(("num_gpus", "global_batch"), [(1, 8), (1, 7), (1, 2), (2, 8)])
def test_no_plan_has_a_micro_step_that_training_refuses(num_gpus, global_batch):
    planned: dict[bool, set[int]] = {False: set(), True: set()}
    for memory_bytes in range(12_000_000, 60_000_000, 1_000_000):
        for contrasts in planned:
            with contextlib.suppress(ConfigError):
                micro_batch = chosen(memory_bytes, 1, num_gpus, global_batch, contrasts).micro_batch
                assert BatchPlan(global_batch, micro_batch, num_gpus, contrasts).validate() == []
                planned[contrasts].add(micro_batch)
    assert (1 in planned[False], 1 in planned[True]) == (True, num_gpus > 1)
    with pytest.raises(ConfigError, match="of two pairs, or of more" if num_gpus == 1 else "of one pair"):
        chosen(12_000_000, 1, num_gpus, global_batch, contrasts=True)


def test_some_ds_configs_are_excluded_on_a_gpu():
    assert "CPUs" in unsuited(Sharding(ds_config("zero3_fp32")), 8)
    assert "bf16" in unsuited(Sharding(ds_config("zero3_fp16")), 8)
    assert [bool(unsuited(Sharding(ds_config("zero3_hpz")), gpus)) for gpus in (8, 12, 16)] == [True, True, False]
    assert not unsuited(Sharding(ds_config("zero2_bf16")), 1)
    for name in ("zero3_qwz_bf16", PLUS_PLUS):
        assert unsuited(Sharding(ds_config(name)), 16).startswith("rounds what ranks exchange to 8 or 4 bits")


# 10 trained numbers in two groups and 4 frozen ones; in stage 3, those of at most 3 persist.
EXCHANGED = ModelSizes(roles={"fusion": 14}, groups=[[6, 1], [3]], largest_module=6, frozen=[4])
PERSISTENT = {"stage3_param_persistence_threshold": 3}


@pytest.mark.parametrize(
    ("zero", "num_micro_steps", "over_all", "within_node"),
    [
        # bf16: 20 bytes of trained weights, 20 of gradients that reach all ranks.
        ({"stage": 1}, 3, {"gradients": 2 * 20, "weights": 20}, {}),
        ({"stage": 2}, 1, {"gradients": 2 * 20, "weights": 20}, {}),
        ({"stage": 2}, 3, {"gradients": 2 * 20 * 3, "weights": 20}, {}),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False}, 3, {"gradients": 20 * 3, "weights": 20}, {}),
        # 10 numbers of all are gathered for each pass, 4 once a step.
        ({"stage": 3, **PERSISTENT}, 1, {"gradients": 20, "weights": 2 * 20 + 8}, {}),
        ({"stage": 3, **PERSISTENT}, 3, {"gradients": 20 * 3, "weights": 2 * 20 * 3 + 8}, {}),
        (
            {"stage": 3, "zero_hpz_partition_size": 4, **PERSISTENT},
            3,
            {"gradients": 20 * 3, "weights": 20 + 8},
            {"weights": 5 * 20},
        ),
        # One byte a gathered weight, half a byte a gradient.
        (
            {
                "stage": 3,
                "zero_hpz_partition_size": 4,
                "zero_quantized_weights": True,
                "zero_quantized_gradients": True,
                **PERSISTENT,
            },
            3,
            {"gradients": 5 * 3, "weights": 10 + 8},
            {"weights": 5 * 10},
        ),
    ],
)
def test_bytes_between_ranks_are_those_counted_by_hand(zero, num_micro_steps, over_all, within_node):
    sharding = Sharding({"bf16": {"enabled": True}, "zero_optimization": zero})
    traffic = step_traffic(EXCHANGED, sharding, num_micro_steps)
    assert (traffic.over_all, traffic.within_node) == (over_all, within_node)
    received = sum(over_all.values()) * 7 / 8 + sum(within_node.values()) * 3 / 4
    assert traffic.received_bytes(8) == pytest.approx(received)


def test_gradients_may_travel_in_another_type_than_the_weights():
    config = {"bf16": {"enabled": True}, "communication_data_type": "fp32", "zero_optimization": {"stage": 2}}
    assert step_traffic(EXCHANGED, Sharding(config), 1).over_all == {"gradients": 2 * 40, "weights": 20}
    with pytest.raises(ConfigError, match="'communication_data_type': 'f99': DeepSpeed knows no such type"):
        Sharding(config | {"communication_data_type": "f99"})


def test_the_slower_of_the_links_in_a_node_and_between_nodes_decides():
    def seconds(num_gpus, within=0, **fabric):
        fabric = {"gpus_per_node": 4, "node_bytes_s": 100.0, "network_bytes_s": 10.0} | fabric
        machine = Machine(num_gpus, 1, 0.0, {}, 1.0, Fabric(**fabric))
        return network_s(Traffic({"gradients": 800}, {"weights": within}, 4), machine)

    assert seconds(1) == 0
    assert seconds(4) == pytest.approx(800 * 3 / 4 / 100)
    # Half of it comes from the other node, by its four network cards.
    assert seconds(8) == pytest.approx(800 / 2 / 40)
    assert seconds(8, network_bytes_s=100.0) == pytest.approx(800 * 7 / 8 / 100)
    assert seconds(8, within=400) == pytest.approx(800 / 2 / 40 + 400 * 3 / 4 / 100)
    assert seconds(8, overlap=0.75) == pytest.approx(800 / 2 / 40 / 4)


def test_hours_follow_from_operations_and_the_fraction_of_the_peak():
    peaks = {"bf16": 1e12, "fp32": 1e11}
    machine = Machine(num_gpus=4, memory_bytes=1, reserve=0.0, peak_flops=peaks, utilization=0.5)
    for precision, peak in peaks.items():
        assert machine.compute_s(100, 1e9, precision) == pytest.approx(100 * 1e9 / (4 * 0.5 * peak))
