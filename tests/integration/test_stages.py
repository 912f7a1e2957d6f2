"""Stages of a training: frozen parts, rates by layer, wsd and skipped data in a run; later stages as runs of their own.

Their towers are a ModernBERT and a vision transformer with registers; those of most other runs a RoBERTa and a CLIP.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from tests.integration.conftest import TWO_MICRO_STEPS
from unimo3.checkpoint import store
from unimo3.data.index import ShardIndex
from unimo3.data.order import SampleOrder
from unimo3.training.metrics import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("commands")]

FIRST = (
    *("--run.name", "first", "--training.steps", "6", "--training.eval_every", "0", "--data.val", "null"),
    *("--checkpoint.every_steps", "2", "--checkpoint.keep_last", "9"),
    *("--optim.freeze", "[text_tower: 1]", "--optim.tower_layer_decay", "0.5", "--optim.warmup_ratio", "0"),
    *("--optim.schedule", "wsd", "--optim.decay_ratio", "0.5"),
    *("--model.vision.architecture", "vit_base_patch14_reg4_dinov2"),
)
TEXT = {
    **{"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"max_position_embeddings": 20, "local_attention": 4, "global_attn_every_n_layers": 2},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 32}
LATER = ("--training.steps", "3", "--training.eval_every", "0", "--data.val", "null", "--run.seed", "1")
# Too small to change a value.
NO_CHANGE = ("--optim.lr", "1e-12", "--optim.warmup_ratio", "0")
LARGER_IMAGES = ("--model.vision.image_size", "48")
FROZEN = ("unimo3.text_tower.embeddings.", "unimo3.text_tower.layers.0.")
TABLE = "unimo3.vision_tower.vit.pos_embed"


def exported(program, out, run, *options):
    program.check(0, "pretrain.export", run, "--out", out, "--dtype", "fp32", *options)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ModernBERT with a global and a local layer, and a DINOv2."""
    text, image = tmp_path_factory.mktemp("modernbert"), tmp_path_factory.mktemp("dinov2")
    ModernBertForMaskedLM(ModernBertConfig(**TEXT)).save_pretrained(text)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**IMAGE)).save_pretrained(image)
    return text, image


@pytest.fixture(scope="module")
def towers(folders):
    return "--model.text.init", folders[0], "--model.vision.init", folders[1]


@pytest.fixture(scope="module")
def first(program, recipe, runs, towers):
    """Four steps on two ranks, and the rest on one, which skips further data."""
    command = ("pretrain.train", "--config", recipe, *FIRST, *towers)
    program.check(2, *command, "--training.stop_after", "4", "--data.skip", "[[1, 3]]")
    assert "optim.freeze: [{'text_tower': 1}]: " in program.output
    assert program.run(1, *command, "--training.micro_batch", "8", "--data.skip", "[[2, 3]]") == 78
    assert "data.skip: [[2, 3]]: changes what was read up to step 4, with [[1, 3]]" in program.output
    program.check(1, *command, "--training.micro_batch", "8", "--data.skip", "[[1, 3], [7, 8]]")
    assert "data.skip: [[1, 3], [7, 8]]: step 5 reads the data of step 7" in program.output
    assert "at step 4, from 2 ranks to 1" in program.output
    return runs / "first"


@pytest.fixture(scope="module")
def last_weights(program, first, tmp_path_factory):
    """An export of the run's end, and what it contains."""
    out = tmp_path_factory.mktemp("stages") / "weights"
    return out, exported(program, out, first)


def test_a_run_with_frozen_layers_and_wsd_resumes_and_exports(
    program, recipe, first, last_weights, folders, towers, tmp_path
):
    records = read_metrics(first)
    assert [record["step"] for record in records] == list(range(1, 7))
    assert [record["lr"] for record in records] == pytest.approx([3e-3] * 4 + [2e-3, 1e-3])
    early, late = exported(program, tmp_path / "early", first, "--tag", "step_00000002"), last_weights[1]
    same = {name for name, value in early.items() if value.equal(late[name])}
    frozen = {name for name in early if name.startswith(FROZEN)}
    assert same >= frozen
    assert len(frozen) == 7  # two embeddings, five of the layer, the first of which has one norm only
    trained = {name for name in early if name.endswith("weight") and early[name].ndim > 1 and name not in same}
    assert any("text_tower.layers.1." in name for name in trained)
    assert any("vision_tower.vit.blocks.0." in name for name in trained)
    text, image = (load_file(folder / "model.safetensors") for folder in folders)
    for name in frozen:
        value = text[name.replace("unimo3.text_tower.", "model.")]
        assert late[name].equal(value.bfloat16().float()), name
    # Two steps at a quarter of the rate.
    patches = image["embeddings.patch_embeddings.projection.weight"]
    torch.testing.assert_close(early["unimo3.vision_tower.vit.patch_embed.proj.weight"], patches, rtol=0.01, atol=2e-3)
    assert patches.std() > 0.01
    assert program.run(2, "pretrain.train", "--config", recipe, *FIRST, *towers, "--optim.freeze", "[]") == 78
    assert "optim.freeze: []: this run was started with [{'text_tower': 1}]; keep that" in program.output


def test_a_loss_of_frozen_parts_alone_ends_a_run_with_78(program, recipe):
    contrast_alone = ("--objectives.mlm.weight", "0", "--objectives.itm.weight", "0")
    freeze = ("--optim.freeze", "[text_tower, vision_tower, heads]", "--run.name", "idle")
    assert program.run(1, "pretrain.train", "--config", recipe, *contrast_alone, *freeze) == 78
    assert "optim.freeze: ['text_tower', 'vision_tower', 'heads']: the loss depends on no parameter" in program.output


def test_skipped_data_is_read_by_no_step_of_any_start(recipe, first):
    data = yaml.safe_load(recipe.read_text())["data"]
    index = ShardIndex(data["train"])
    order = SampleOrder(index.samples_per_shard, 0, data["window_shards"])
    read: dict[int, list] = {}
    for path in sorted((first / "ledger").iterdir()):
        for record in map(json.loads, path.read_text().splitlines()):
            read.setdefault(record["step"], []).extend((shard, unit) for _, shard, unit, _ in record["samples"])
    assert [record["data_step"] for record in read_metrics(first)] == [1, 4, 5, 6, 7, 9]
    for step, batch in enumerate((0, 3, 4, 5, 6, 8), start=1):
        units = [order[position] for position in range(8 * batch, 8 * batch + 8)]
        assert sorted(read[step]) == sorted((index.shards[unit.shard].name, unit.unit) for unit in units)
    state = json.loads((store.folder_of(first) / "step_00000006" / store.STATE).read_text())
    assert state["extra"]["settings"]["data.skip"] == [[1, 3], [7, 8]]


def test_a_cool_down_starts_from_a_checkpoint_of_another_run(program, recipe, runs, first, tmp_path):
    checkpoint = store.folder_of(first) / "step_00000004"
    before = exported(program, tmp_path / "before", first, "--tag", checkpoint.name)
    train = Path(yaml.safe_load(recipe.read_text())["data"]["train"])
    mixture = f"{{{train}: 1, {train.with_name('val')}: 3}}"
    options = (*LATER, *NO_CHANGE, *LARGER_IMAGES, "--run.name", "second", "--optim.schedule", "cosine")
    command = ("pretrain.train", "--config", recipe, *options, "--model.init", checkpoint, "--data.train", mixture)
    program.check(2, *command, "--training.stop_after", "2")
    second = runs / "second"
    assert (
        "the data sources of this run are not those of its weights: coco/train is 0.25 of the stream, previously 1; "
        "coco/val added (0.75 of the stream, index "
    ) in program.output
    assert f"model.init: {checkpoint} exported to {second}/init" in program.output
    shutil.rmtree(checkpoint)  # as retention does
    shutil.rmtree(second / "init")
    program.check(1, *command, "--training.micro_batch", "8")
    assert "at step 2, from 2 ranks to 1" in program.output
    assert [record["lr"] for record in read_metrics(second)] == pytest.approx([1e-12, 0.75e-12, 0.25e-12])
    sources = [
        json.loads((store.folder_of(run) / tag / store.STATE).read_text())["extra"]
        for run, tag in ((first, "step_00000006"), (second, "step_00000003"))
    ]
    assert sources[1]["init_data"] == sources[0]["data"]
    assert [source["weight"] for source in sources[1]["data"]] == [1, 3]
    after = exported(program, tmp_path / "after", second)
    assert before.keys() == after.keys()
    assert (before[TABLE].shape[1], after[TABLE].shape[1]) == (2 * 2, 3 * 3)
    for name in before.keys() - {TABLE}:
        # A new engine rounds its float32 copies to the precision of the ds_config.
        torch.testing.assert_close(after[name], before[name].bfloat16().float(), rtol=0, atol=1e-9)


def test_a_stage_with_frozen_parts_starts_from_a_run_and_resumes(program, recipe, runs, first, last_weights, tmp_path):
    run, rate = runs / "from_run", 1e-4
    options = ("--run.name", run.name, "--optim.lr", rate, "--optim.warmup_ratio", "0", "--optim.schedule", "constant")
    options += ("--optim.freeze", "[vision_tower, fusion]", "--data.skip", "[[1, 2]]", *TWO_MICRO_STEPS)
    command = (2, "pretrain.train", "--config", recipe, *LATER, *options, "--model.init", first)
    program.check(*command, "--training.stop_after", "2")
    assert f"model.init: {store.folder_of(first)}/step_00000006 exported to {run}/init" in program.output
    shutil.rmtree(run / "init")
    program.check(*command)
    assert f"resumed from {run}/checkpoints/step_00000002" in program.output
    assert [(record["lr"], record["data_step"]) for record in read_metrics(run)] == [(rate, 1), (rate, 3), (rate, 4)]
    before, after = last_weights[1], exported(program, tmp_path / "after", run)
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_frozen = name.startswith("unimo3.") and not name.startswith("unimo3.text_tower.")
        is_same = after[name].equal(value.bfloat16().float())
        assert is_same if is_frozen else not is_same or value.ndim < 2, name
        # Heads have twice the rate; three steps of Adam move a value by little more than that each.
        torch.testing.assert_close(after[name], value.bfloat16().float(), rtol=0, atol=10 * rate)


def test_a_stage_of_larger_images_and_longer_texts_starts_from_an_export(program, recipe, runs, last_weights, tmp_path):
    source, before = last_weights
    shutil.copytree(source, tmp_path / "source")
    options = ("--run.name", "from_export", *NO_CHANGE, *LARGER_IMAGES, "--data.max_text_tokens", "20")
    options += ("--optim.schedule", "wsd", "--optim.decay_ratio", "0.67")
    command = (2, "pretrain.train", "--config", recipe, *LATER, *options, "--model.init", tmp_path / "source")
    program.check(*command, "--training.stop_after", "2")
    shutil.rmtree(tmp_path / "source")
    program.check(*command)
    run = runs / "from_export"
    assert f"resumed from {run}/checkpoints/step_00000002" in program.output
    assert [record["lr"] for record in read_metrics(run)] == pytest.approx([1e-12, 1e-12, 0.5e-12])
    after = exported(program, tmp_path / "after", run)
    assert {name for name in before.keys() | after.keys() if before[name].shape != after[name].shape} == {TABLE}
    for name in before.keys() - {TABLE}:
        torch.testing.assert_close(after[name], before[name].bfloat16().float(), rtol=0, atol=1e-9)
    assert json.loads((tmp_path / "after" / "tokenizer_config.json").read_text())["model_max_length"] == 20
