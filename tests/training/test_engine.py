"""DeepSpeed configurations: each loads, those a CPU can run train, and ranks agree under all of them."""

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.spawn import run_ranks
from tests.tiny import rows, tiny_batch, tiny_config
from unimo3.kernels.args import KernelArgs
from unimo3.training.ds_config import BatchPlan, file_errors, read_ds_config
from unimo3.training.engine import build_engine, build_model, gradient_norm, prepare_layers
from unimo3.training.optim import OptimArgs

FOLDER = Path(__file__).parents[2] / "ds_configs"
ON_CPU = ("zero2_bf16", "zero3_bf16", "zero3_fp32", "zero3_offload_cpu")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_ds_config_loads_in_deepspeed(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    assert file_errors(str(path)) == []
    filled = read_ds_config(str(path), BatchPlan(64, 8, world_size=1), clip_norm=1.0, swap_folder="/scratch/run")
    loaded = DeepSpeedConfig(filled)
    assert (loaded.train_batch_size, loaded.train_micro_batch_size_per_gpu) == (64, 8)
    assert loaded.gradient_accumulation_steps == 8
    assert loaded.zero_config.stage == (2 if "zero2" in path.stem else 3)
    assert loaded.bfloat16_config.enabled == ("fp16" not in path.stem.replace("bf16", "") and "fp32" not in path.stem)
    zero = loaded.zero_config
    assert (zero.zero_hpz_partition_size > 1) == any(word in path.stem for word in ("hpz", "qwz", "zeropp"))
    assert zero.zero_quantized_weights == any(word in path.stem for word in ("qwz", "zeropp"))
    assert zero.zero_quantized_gradients == ("zeropp" in path.stem)
    assert (zero.offload_optimizer is not None) == ("offload" in path.stem)
    if "nvme" in path.stem:
        assert (zero.offload_optimizer.device, str(zero.offload_optimizer.nvme_path)) == ("nvme", "/scratch/run")
        assert loaded.aio_config["block_size"] == 2**20


def test_a_ds_config_has_no_key_deepspeed_does_not_know():
    # DeepSpeed drops unknown keys of its ZeRO section silently; its model lists those it knows.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    for path in FOLDER.glob("*.json"):
        assert set(json.loads(path.read_text())["zero_optimization"]) <= known, path.name


def losses_under_each_config():
    from unimo3.distributed import sum_over_ranks, world
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    rank, size = world()
    micro_batch = 8 // size
    by_config = {}
    for name in ON_CPU:
        # No clipping: DeepSpeed sums the norm of offloaded gradients in another order, and a norm that differs in its
        # last bit scales every gradient differently. Complete runs in tests/integration clip.
        ds_config = read_ds_config(str(FOLDER / f"{name}.json"), BatchPlan(8, micro_batch, size), clip_norm=0.0)
        model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config()))
        initialize_weights(model, 0, std=0.1)
        task = PretrainingLoss(model, ObjectivesArgs().build(seed=0))
        # One implementation for all: only the sharding is compared.
        engine = build_engine(task, model, ds_config, OptimArgs(lr=1e-3, fused="torch"))
        losses = []
        for seed in range(4):
            report = engine(rows(tiny_batch(8, seed), rank * micro_batch, (rank + 1) * micro_batch))
            engine.backward(report["loss"])
            engine.step()
            assert math.isfinite(float(gradient_norm(engine)))
            losses.append(float(sum_over_ranks(report["loss"].detach().reshape(1))) / size)
        by_config[name] = losses
    return by_config


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


def losses_with_each_optimizer():
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    ds_config = read_ds_config(str(FOLDER / "zero3_offload_cpu.json"), BatchPlan(4, 4, 1), clip_norm=0.0)
    by_optimizer = {}
    for fused in ("auto", "torch"):
        model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config()))
        initialize_weights(model, 0, std=0.1)
        task = PretrainingLoss(model, ObjectivesArgs().build(seed=0))
        engine = build_engine(task, model, ds_config, OptimArgs(lr=1e-3, fused=fused))
        losses = []
        for seed in range(4):
            loss = engine(tiny_batch(4, seed))["loss"]
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        by_optimizer[type(engine.optimizer.optimizer).__name__] = losses
    return by_optimizer


@pytest.mark.integration
def test_an_offloaded_optimizer_is_deepspeeds_and_trains_as_torchs():
    (losses,) = run_ranks(1, losses_with_each_optimizer)
    # Weights are bf16 in the step; a last bit of the update may round another way.
    assert losses["DeepSpeedCPUAdam"] == pytest.approx(losses["AdamW"], rel=5e-3)
    assert losses["AdamW"][3] != pytest.approx(losses["AdamW"][0], rel=5e-3)


def losses_of_a_beit():
    from unimo3.distributed import world
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    mine = rows(tiny_batch(8), 4 * world()[0], 4 * world()[0] + 4)
    ds_config = read_ds_config(str(FOLDER / "zero3_fp32.json"), BatchPlan(8, 4, 2), clip_norm=0.0)
    vision = tiny_config().vision_config.to_dict() | {"architecture": "beit_base_patch16_224"}
    config, tasks = tiny_config(vision_config=vision), []
    for model in (Unimo3ForPreTraining(config), build_model(ds_config, lambda: Unimo3ForPreTraining(config))):
        initialize_weights(model, 0, std=0.1)
        prepare_layers(model, KernelArgs(), activation_checkpointing=True, compile_towers=False)
        tasks.append(PretrainingLoss(model, ObjectivesArgs().build(seed=0)))
    losses = [float(tasks[0](mine)["loss"])]
    engine = build_engine(tasks[1], tasks[1].model, ds_config, OptimArgs(lr=1e-3, fused="torch"))
    for _ in range(2):
        loss = engine(mine)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


@pytest.mark.integration
def test_a_beit_whose_attention_reads_weights_itself_trains_sharded():
    for plain, first, second in run_ranks(2, losses_of_a_beit):
        assert first == pytest.approx(plain, rel=1e-5)
        assert second < first


BRIDGED = {"bridge": True, "unimodal_levels": 2, "num_hidden_layers": 2}


def losses_with_and_without_checkpointing():
    from unimo3.distributed import world
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    rank, size = world()
    micro_batch = 8 // size
    ds_config = read_ds_config(str(FOLDER / "zero3_fp32.json"), BatchPlan(8, micro_batch, size), clip_norm=0.0)
    results = []
    for checkpointing in (False, True):
        model = build_model(ds_config, lambda: Unimo3ForPreTraining(tiny_config(**BRIDGED)))
        initialize_weights(model, 0, std=0.1)
        prepare_layers(model, KernelArgs(), checkpointing, compile_towers=False)
        engine = build_engine(PretrainingLoss(model, ObjectivesArgs().build(seed=0)), model, ds_config, OptimArgs())
        engine.train()
        runs: list[int] = []
        model.unimo3.fusion.text.layers[0].self_attention.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        losses = []
        for seed in range(3):
            report = engine(rows(tiny_batch(8, seed), rank * micro_batch, (rank + 1) * micro_batch))
            engine.backward(report["loss"])
            engine.step()
            losses.append((float(report["loss"]), float(gradient_norm(engine))))
        results.append((losses, len(runs)))
    return results


@pytest.mark.integration
def test_activation_checkpointing_changes_no_loss_under_zero_3():
    for (plain, plain_runs), (checkpointed, runs) in run_ranks(2, losses_with_and_without_checkpointing):
        assert checkpointed == plain
        assert (plain_runs, runs) == (3, 6)


def fill_sharded_models(root: str):
    from unimo3.model.args import ModelArgs, TextArgs, VisionArgs

    sizes = {"image_size": 24, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
    towers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return [
        fill_sharded_model(args)
        for args in (
            ModelArgs(TextArgs(), VisionArgs(image_size=24), init=f"{root}/bridgetower"),
            ModelArgs(TextArgs(init=f"{root}/roberta"), VisionArgs(init=f"{root}/clip", **sizes), **towers),
            ModelArgs(TextArgs(init=f"{root}/roberta"), VisionArgs(init=f"{root}/vit.safetensors", **sizes), **towers),
        )
    ]


def fill_sharded_model(args):
    from deepspeed import zero

    from unimo3.model.args import set_initial_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining

    plain = Unimo3ForPreTraining(args.to_config())
    set_initial_weights(plain, args, seed=0)
    ds_config = read_ds_config(str(FOLDER / "zero3_fp32.json"), BatchPlan(2, 1, 2), clip_norm=0.0)
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(args.to_config()))

    most_gathered = 0
    enter = zero.GatheredParameters.__enter__

    def count(context):
        nonlocal most_gathered
        enter(context)
        most_gathered = max(most_gathered, sum(p.numel() for p in model.parameters()))

    zero.GatheredParameters.__enter__ = count
    set_initial_weights(model, args, seed=0)
    zero.GatheredParameters.__enter__ = enter
    differing = []
    for name, parameter in model.named_parameters():
        with zero.GatheredParameters([parameter]):
            if not parameter.equal(plain.get_parameter(name)):
                differing.append(name)
    base = plain.unimo3
    probes = {
        "text": base.text_tower.encoder.layer[1].output.dense.bias.detach().clone(),
        "image": base.vision_tower.vit.blocks[1].attn.proj.bias.detach().clone(),
    }
    return differing, most_gathered, max(p.numel() for p in plain.parameters()), probes


@pytest.mark.integration
def test_sharded_models_are_filled_from_elsewhere_one_parameter_at_a_time(tmp_path):
    import numpy as np
    import timm
    import torch
    from safetensors.torch import save_file
    from transformers import BridgeTowerModel, CLIPVisionModel, RobertaModel

    from tests.model.test_bridgetower import draw_config, spread
    from tests.model.tower_cases import ARCHITECTURE, SIZES, clip_vision

    bridgetower = BridgeTowerModel(draw_config(np.random.default_rng(2), vision={"patch_size": 8, "image_size": 16}))
    roberta = RobertaModel(tiny_config().text_config, add_pooling_layer=False)
    clip_config = clip_vision()
    clip_config.num_hidden_layers = 2
    clip = CLIPVisionModel(clip_config)
    for seed, (name, model) in enumerate({"bridgetower": bridgetower, "roberta": roberta, "clip": clip}.items()):
        spread(model, seed)
        model.save_pretrained(tmp_path / name)
    vit = timm.create_model(ARCHITECTURE, img_size=16, num_classes=0, **(SIZES | {"depth": 2}))
    spread(vit, 4)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")

    text_bias = roberta.encoder.layer[1].output.dense.bias
    clip_bias = next(p for name, p in clip.named_parameters() if name.endswith("layers.1.self_attn.out_proj.bias"))
    expected = [
        (
            bridgetower.text_model.encoder.layer[1].output.dense.bias,
            bridgetower.vision_model.visual.transformer.resblocks[1].attn.out_proj.bias,
        ),
        (text_bias, clip_bias),
        (text_bias, vit.blocks[1].attn.proj.bias),
    ]
    for cases in run_ranks(2, fill_sharded_models, str(tmp_path)):
        for (differing, most_gathered, largest, probes), (text, image) in zip(cases, expected, strict=True):
            assert differing == []
            assert torch.equal(probes["text"], text)
            assert torch.equal(probes["image"], image)
            # A linear map is filled with its bias.
            assert largest <= most_gathered < 1.1 * largest


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_towers_give_the_same_losses_and_keep_their_names():
    import torch

    from tests.tiny import tiny_pretraining_model
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    # Towers of one layer each: the compiler takes seconds a kernel.
    one_layer = tiny_config(num_hidden_layers=1).to_dict()
    one_layer["text_config"]["num_hidden_layers"] = one_layer["vision_config"]["overrides"]["depth"] = 1
    sizes = {key: one_layer[key] for key in ("text_config", "vision_config", "num_hidden_layers")}
    results = []
    for compiled in (False, True):
        model = tiny_pretraining_model(**sizes).train()
        prepare_layers(model, KernelArgs(), activation_checkpointing=False, compile_towers=compiled)
        for tower in (model.unimo3.text_tower, model.unimo3.vision_tower):
            assert (tower._compiled_call_impl is not None) == compiled
        loss = PretrainingLoss(model, ObjectivesArgs().build(0))(tiny_batch(4))["loss"]
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, plain_gradients), (loss, gradients) = results
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, plain_gradients, atol=1e-4, rtol=1e-4)


def test_the_batch_plan_divides_the_global_batch():
    assert BatchPlan(4096, 64, 8).num_accumulation == 8
    assert BatchPlan(4096, 64, 8).validate() == []
    assert BatchPlan(100, 8, 4).validate()[0].startswith("training.global_batch: 100: does not divide")
    assert "use 96 or 128" in BatchPlan(100, 8, 4).validate()[0]
    assert len(BatchPlan(0, -1, 4).validate()) == 2


def losses_with_each_attention_kernel():
    import os

    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
    from unimo3.distributed import world
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.args import ObjectivesArgs
    from unimo3.objectives.base import PretrainingLoss

    rank, size = world()
    micro_batch = 4 // size
    ds_config = read_ds_config(str(FOLDER / "zero3_fp32.json"), BatchPlan(4, micro_batch, size), clip_norm=0.0)
    results = []
    for kernel, checkpointing in (("reference", False), ("triton", False), ("triton", True)):
        # Heads 32 wide, which the kernels support.
        model = build_model(
            ds_config, lambda: Unimo3ForPreTraining(tiny_config(num_attention_heads=1, num_hidden_layers=2))
        )
        initialize_weights(model, 0, std=0.1)
        kernels = KernelArgs(cross_layer_attention=kernel)
        prepare_layers(model, kernels, checkpointing, compile_towers=False)
        engine = build_engine(PretrainingLoss(model, ObjectivesArgs().build(seed=0)), model, ds_config, OptimArgs())
        losses = []
        for seed in range(2):
            report = engine(rows(tiny_batch(4, seed), rank * micro_batch, (rank + 1) * micro_batch))
            engine.backward(report["loss"])
            engine.step()
            losses.append((float(report["loss"]), float(gradient_norm(engine))))
        results.append(losses)
    return results


@pytest.mark.integration
def test_the_triton_kernels_train_under_zero_3_as_the_reference_does():
    for reference, triton, checkpointed in run_ranks(2, losses_with_each_attention_kernel):
        for plain, fused in zip(reference, triton, strict=True):
            assert fused == pytest.approx(plain, rel=1e-4)
        assert checkpointed == triton
