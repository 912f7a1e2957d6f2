"""Parts that do not train: which parameters they are, and training, checkpoints and plans with them."""

import pytest
import torch

from tests.spawn import run_ranks
from tests.tiny import tiny_config, tiny_pretraining_model
from tests.training.parts_ranks import STAGES, begin_frozen, resume_frozen
from unimo3.errors import ConfigError
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.args import PARTS, OptimArgs
from unimo3.training.optim import parameter_groups
from unimo3.training.parts import check_trains, freeze_errors, freeze_parts, parameter_levels, parts_of
from unimo3.training.plan.step_trace import build_on_meta

TEXT, VISION = "unimo3.text_tower.", "unimo3.vision_tower.vit."
LOWEST_TEXT = (f"{TEXT}embeddings.", f"{TEXT}encoder.layer.0.")


def frozen_names(*freeze, **changes):
    model = tiny_pretraining_model(**changes)
    freeze_parts(model, OptimArgs(freeze=list(freeze)))
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_each_parameter_belongs_to_one_part():
    model = tiny_pretraining_model()
    parts = parts_of(model)
    assert tuple(parts) == PARTS
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(map(len, parts.values())) == len(names)
    for part, prefixes in zip(PARTS, ((TEXT,), (VISION,), ("unimo3.",), ("mlm_", "itm_", "itc_")), strict=True):
        assert all(names[parameter].startswith(prefixes) for parameter in parts[part])
    assert "mlm_head.decoder.weight" not in names.values()  # the word embedding, of the text tower


def test_a_frozen_part_is_all_of_it_and_nothing_else():
    assert frozen_names() == set()
    everything = {name for name, _ in tiny_pretraining_model().named_parameters()}
    assert frozen_names("text_tower") == {name for name in everything if name.startswith(TEXT)}
    heads = {name for name in everything if not name.startswith("unimo3.")}
    assert (
        frozen_names("heads", "fusion") == {name for name in everything if not name.startswith((TEXT, VISION))} >= heads
    )


def test_a_number_freezes_embeddings_and_the_lowest_layers():
    everything = {name for name, _ in tiny_pretraining_model().named_parameters()}
    assert frozen_names({"text_tower": 1}) == {name for name in everything if name.startswith(LOWEST_TEXT)}
    assert frozen_names({"text_tower": 0}) == {name for name in everything if name.startswith(LOWEST_TEXT[0])}
    after = (f"{VISION}blocks.1.", f"{VISION}norm.")
    image = {name for name in everything if name.startswith(VISION)}
    assert frozen_names({"vision_tower": 1}) == {name for name in image if not name.startswith(after)}
    # All layers are not all of the tower: the norm after them trains.
    assert image - frozen_names({"vision_tower": 2}) == {f"{VISION}norm.weight", f"{VISION}norm.bias"}


def test_shared_positions_of_a_beit_belong_to_its_embeddings():
    vision = tiny_config().vision_config.to_dict() | {"architecture": "beit_base_patch16_224"}
    tower = Unimo3ForPreTraining(tiny_config(vision_config=vision)).unimo3.vision_tower
    names = {parameter: name for name, parameter in tower.named_parameters()}
    levels = {names[parameter]: level for parameter, level in parameter_levels(tower).items()}
    assert levels["vit.cls_token"] == levels["vit.patch_embed.proj.weight"] == 0
    assert levels["vit.blocks.0.attn.relative_position_bias_table"] == 1
    assert levels["vit.blocks.1.mlp.fc1.bias"] == 2
    assert {level for name, level in levels.items() if "norm." in name and "blocks" not in name} <= {3}


def test_a_modernbert_and_registers_have_their_levels_and_are_planned():
    text = tiny_config().text_config
    sizes = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    text = sizes | {"model_type": "modernbert", "num_attention_heads": 2, "intermediate_size": 64}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    vision = tiny_config().vision_config.to_dict() | {"architecture": "vit_base_patch14_reg4_dinov2"}
    model = Unimo3ForPreTraining(tiny_config(text_config=text, vision_config=vision))
    planned = build_on_meta(model.config)
    sizes = [sum(parameter.numel() for parameter in built.parameters()) for built in (model, planned)]
    assert sizes[0] == sizes[1]
    names = {parameter: name for name, parameter in model.named_parameters()}
    levels = {}
    for tower in (model.unimo3.text_tower, model.unimo3.vision_tower):
        levels |= {names[parameter]: level for parameter, level in parameter_levels(tower).items()}
    assert levels[f"{TEXT}embeddings.tok_embeddings.weight"] == levels[f"{VISION}reg_token"] == 0
    assert levels[f"{TEXT}layers.0.mlp.Wi.weight"] == levels[f"{VISION}blocks.0.ls1.gamma"] == 1
    assert levels[f"{TEXT}layers.1.attn.Wqkv.weight"] == levels[f"{VISION}blocks.1.norm2.bias"] == 2
    assert levels[f"{TEXT}final_norm.weight"] == levels[f"{VISION}norm.weight"] == 3
    args = OptimArgs(freeze=[{"text_tower": 1}], tower_layer_decay=0.5)
    freeze_parts(model, args)
    rates = {names[p]: group["lr"] for group in parameter_groups(model, args) for p in group["params"]}
    assert rates[f"{TEXT}final_norm.weight"] == rates[f"{TEXT}layers.1.attn.Wqkv.weight"] == args.lr
    assert rates[f"{VISION}reg_token"] == args.lr / 4
    assert f"{TEXT}layers.0.mlp.Wi.weight" not in rates


def test_the_optimizer_has_trained_parameters_alone():
    model = tiny_pretraining_model()
    args = OptimArgs(freeze=[{"text_tower": 1}, "vision_tower", "heads"])
    freeze_parts(model, args)
    grouped = [parameter for group in parameter_groups(model, args) for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group["name"] for group in parameter_groups(model, args)] == [
        "tower_decay",
        "tower_no_decay",
        "fusion_decay",
        "fusion_no_decay",
    ]


@pytest.mark.parametrize(
    ("freeze", "error"),
    [
        (["text"], "'text': no such part; one of text_tower, vision_tower, fusion, heads, or a tower with a number"),
        (["fusion", "fusion"], "fusion: named 2 times; name it once"),
        ([{"fusion": 2}], "fusion: 2: only towers have layers to count; write fusion"),
        ([{"vision_tower": -1}], "vision_tower: -1: 0 (embeddings alone) or more is needed"),
        (list(PARTS), f"{list(PARTS)}: no parameter is left to train; leave a part out"),
    ],
)
def test_what_cannot_be_frozen_is_named(freeze, error):
    (line,) = OptimArgs(freeze=freeze).validate()
    assert line.startswith(f"optim.freeze: {error}")


def test_more_layers_than_a_tower_has_are_refused_before_a_start():
    args = OptimArgs(freeze=[{"text_tower": 3, "vision_tower": 5}])
    expected = [
        "optim.freeze: text_tower: 3: the tower has 2 layers; name at most that, or text_tower alone to freeze all "
        "of it",
        "optim.freeze: vision_tower: 5: the tower has 2 layers; name at most that, or vision_tower alone to freeze all "
        "of it",
    ]
    assert freeze_errors(tiny_config(), args) == expected
    with pytest.raises(ConfigError) as raised:
        freeze_parts(tiny_pretraining_model(), args)
    assert raised.value.errors == expected


def test_freezing_every_layer_of_all_there_is_is_refused():
    # The text tower has nothing above its layers.
    args = OptimArgs(freeze=[{"text_tower": 2}, "vision_tower", "fusion", "heads"])
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        freeze_parts(tiny_pretraining_model(), args)


def test_a_loss_of_frozen_parts_alone_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.freeze: \['heads'\]: the loss depends on no parameter that trains"):
        check_trains(torch.zeros(()), ["heads"])
    check_trains(torch.zeros((), requires_grad=True), ["heads"])


FROZEN = OptimArgs(lr=1e-3, fused="torch", freeze=[{"text_tower": 1}, "heads"], tower_layer_decay=0.5)
# The first step of Adam moves a value by the rate, unless its gradient is close to zero.
FIRST_MOVES = {f"{VISION}patch": 2.5e-4, f"{VISION}blocks.0.": 5e-4, f"{VISION}blocks.1.": 1e-3, "unimo3.fusion.": 5e-3}


@pytest.fixture(scope="module")
def frozen_runs(tmp_path_factory):
    """What two ranks began, and what two ranks and one rank resumed."""
    root = tmp_path_factory.mktemp("frozen")
    return (
        run_ranks(2, begin_frozen, root, FROZEN)[0],
        run_ranks(2, resume_frozen, root, FROZEN)[0],
        run_ranks(1, resume_frozen, root, FROZEN)[0],
    )


@pytest.mark.integration
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_values_stay_and_the_others_train(frozen_runs, stage):
    before, saved = frozen_runs[0][stage]["before"], frozen_runs[0][stage]["saved"]
    same = {name for name, value in before.items() if value.equal(saved[name])}
    frozen = {name for name in before if name.startswith((*LOWEST_TEXT, "itc_", "itm_", "mlm_"))}
    assert frozen <= same
    # Gates whose level is not read, and bf16 rounds small steps away.
    trained = {name for name in before if name.endswith("weight") and before[name].ndim > 1} - frozen
    assert len(trained & same) < 0.1 * len(trained)


@pytest.mark.integration
def test_a_step_moves_each_layer_by_its_own_rate(frozen_runs):
    result = frozen_runs[0]["zero3"]  # in float32
    for prefix, rate in FIRST_MOVES.items():
        names = [name for name in result["before"] if name.startswith(prefix)]
        moved = max(float((result["first"][name] - result["before"][name]).abs().max()) for name in names)
        assert moved == pytest.approx(rate, rel=0.02), prefix


@pytest.mark.integration
@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_restores_frozen_and_trained_values(frozen_runs, stage):
    begun, resumed, alone = (run.get(stage) for run in frozen_runs)
    for result in (resumed, alone) if alone else (resumed,):
        assert begun["saved"].keys() == result["loaded"].keys()
        assert all(value.equal(result["loaded"][name]) for name, value in begun["saved"].items())
        assert result["rates"] == begun["rates"]
    assert resumed["losses"] == begun["losses"]
    if alone:
        assert alone["losses"] == pytest.approx(begun["losses"], rel=1e-5 if stage == "zero3" else 0.02)
