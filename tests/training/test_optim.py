"""Parameter groups by role, and the learning rate as a function of the step."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tiny import tiny_config, tiny_pretraining_model
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.training.lr_schedule import lr_scale, set_lr
from unimo3.training.optim import OptimArgs, build_optimizer, parameter_groups

ARGS = OptimArgs(lr=1e-3, fusion_factor=5.0, head_factor=50.0, weight_decay=0.1)


@pytest.mark.parametrize(
    "model", [tiny_pretraining_model(), Unimo3ForVisualQuestionAnswering(tiny_config(num_answers=3))]
)
def test_every_parameter_is_in_one_group_with_its_roles_rate(model):
    groups = parameter_groups(model, ARGS)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith(("unimo3.text_tower", "unimo3.vision_tower")):
            expected = 1e-3
        else:
            expected = 5e-3 if name.startswith("unimo3.") else 5e-2
        assert rates[id(parameter)] == pytest.approx(expected), name


def test_the_rate_falls_from_layer_to_layer_of_each_tower():
    text = tiny_config().text_config.to_dict() | {"num_hidden_layers": 3}
    model = tiny_pretraining_model(text_config=text)
    groups = parameter_groups(model, replace(ARGS, tower_layer_decay=0.5))
    rates = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    # Three layers of text, two of images.
    by_prefix = {
        "unimo3.text_tower.embeddings.": 1.25e-4,
        "unimo3.text_tower.encoder.layer.0.": 2.5e-4,
        "unimo3.text_tower.encoder.layer.1.": 5e-4,
        "unimo3.text_tower.encoder.layer.2.": 1e-3,
        "unimo3.vision_tower.vit.blocks.0.": 5e-4,
        "unimo3.vision_tower.vit.blocks.1.": 1e-3,
        "unimo3.vision_tower.vit.norm.": 1e-3,
        "unimo3.vision_tower.": 2.5e-4,
        "unimo3.": 5e-3,
        "": 5e-2,
    }
    for name, parameter in model.named_parameters():
        expected = next(rate for prefix, rate in by_prefix.items() if name.startswith(prefix))
        assert rates[id(parameter)] == pytest.approx(expected), name
    assert [group["name"] for group in groups] == [
        *(f"tower_below_{num_above}_{kind}" for num_above in (3, 2, 1) for kind in ("decay", "no_decay")),
        *(f"{role}_{kind}" for role in ("tower", "fusion", "head") for kind in ("decay", "no_decay")),
    ]
    assert {group["lr"] for group in groups} == set(rates.values())


def test_only_weight_matrices_decay():
    model = tiny_pretraining_model()
    decay = {id(p): group["weight_decay"] for group in parameter_groups(model, ARGS) for p in group["params"]}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_matrix = isinstance(owner, (nn.Linear, nn.Conv2d, nn.Embedding)) and name.endswith("weight")
        assert decay[id(parameter)] == (0.1 if is_matrix else 0.0), name


def test_the_rate_rises_linearly_then_falls_to_zero():
    scales = [lr_scale(step, 100, 0.1) for step in range(101)]
    assert scales[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert max(scales) == scales[10] == 1.0
    assert scales[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 101)])
    assert lr_scale(0, 100, 0.0) == 1.0


def test_other_schedules_follow_the_same_warm_up():
    for schedule in ("cosine", "constant"):
        assert [lr_scale(step, 100, 0.1, schedule) for step in range(11)] == [
            lr_scale(step, 100, 0.1) for step in range(11)
        ]
    # A quarter, half and three quarters of the way from step 10 to 90.
    cosine = [lr_scale(step, 90, 10 / 90, "cosine") for step in (30, 50, 70, 90)]
    assert cosine == pytest.approx([(2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0])
    assert {lr_scale(step, 100, 0.1, "constant") for step in range(10, 101)} == {1.0}


def test_wsd_stays_at_the_peak_and_falls_over_the_last_steps():
    scales = [lr_scale(step, 100, 0.1, "wsd", decay_ratio=0.2) for step in range(101)]
    assert scales[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert scales[10:81] == [1.0] * 71
    assert scales[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 101)])
    # At least one step decays; and a cool-down is all decay, as the linear schedule without a warm-up is.
    assert [lr_scale(step, 3, 0.0, "wsd", 0.1) for step in range(4)] == [1.0, 1.0, 1.0, 0.0]
    assert [lr_scale(step, 7, 0.0, "wsd", 1.0) for step in range(8)] == [lr_scale(step, 7, 0.0) for step in range(8)]


def test_a_decay_that_has_no_steps_or_no_effect_is_refused():
    (line,) = OptimArgs(schedule="cosine", decay_ratio=0.2).validate()
    assert line.startswith("optim.decay_ratio: 0.2: only wsd reads it, optim.schedule is cosine; set that to wsd")
    for ratio in (0.0, 0.95, float("nan")):
        (line,) = OptimArgs(schedule="wsd", decay_ratio=ratio).validate()
        assert line.startswith(f"optim.decay_ratio: {ratio}: above 0 and at most 0.9, what optim.warmup_ratio leaves")
    assert OptimArgs(schedule="wsd", decay_ratio=0.9).validate() == []


def test_rates_by_layer_of_towers_that_do_not_train_are_refused():
    (line,) = OptimArgs(tower_layer_decay=0.5, freeze=["text_tower", "vision_tower"]).validate()
    assert line.startswith("optim.tower_layer_decay: 0.5: has no effect, optim.freeze freezes both towers; leave it")
    assert OptimArgs(tower_layer_decay=0.5, freeze=[{"text_tower": 1}, "vision_tower"]).validate() == []


def test_an_unknown_schedule_is_named_with_those_there_are():
    assert OptimArgs(schedule="cyclic").validate() == [
        "optim.schedule: 'cyclic': one of linear, cosine, constant, wsd is needed"
    ]


def test_rates_are_set_from_the_peak_each_time():
    optimizer = build_optimizer(tiny_pretraining_model(), ARGS)
    set_lr(optimizer, 0.1)
    set_lr(optimizer, 0.5)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {
            "tower_decay": 5e-4,
            "tower_no_decay": 5e-4,
            "fusion_decay": 2.5e-3,
            "fusion_no_decay": 2.5e-3,
            "head_decay": 2.5e-2,
            "head_no_decay": 2.5e-2,
        }
    )
    assert isinstance(optimizer, torch.optim.AdamW)


def test_errors_name_field_and_value():
    errors = OptimArgs(lr=0, beta2=1.0, clip_norm=-1, tower_layer_decay=1.5).validate()
    assert [line.split(":")[0] for line in errors] == [
        "optim.lr",
        "optim.tower_layer_decay",
        "optim.clip_norm",
        "optim.beta2",
    ]
