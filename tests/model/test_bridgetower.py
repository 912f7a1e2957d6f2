"""This model with bridges is transformers' BridgeTower: the same outputs after a map of names."""

import numpy as np
import pytest
import torch
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
    RobertaModel,
)

from tests.tiny import tiny_config
from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs, set_initial_weights
from unimo3.model.pretrained import bridgetower_config, load_bridgetower
from unimo3.model.unimo3 import Unimo3ForPreTraining

NUM_CONFIGS = 10


def draw_config(rng: np.random.Generator, **changes) -> BridgeTowerConfig:
    """A small BridgeTower of random depths, widths, heads and image size."""
    depth = int(rng.integers(2, 5))
    # Its image heads are 64 wide, whatever the configuration is.
    width, image_width = int(rng.choice([32, 64, 96])), int(rng.choice([64, 128]))
    patch = int(rng.choice([4, 8]))
    text = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": int(rng.choice([2, 4])),
        "intermediate_size": int(rng.choice([48, 80])),
        "vocab_size": 70,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "hidden_size": image_width,
        "num_hidden_layers": depth + int(rng.integers(0, 3)),
        "patch_size": patch,
        "image_size": patch * int(rng.integers(2, 5)),
    }
    return BridgeTowerConfig(
        hidden_size=width,
        num_hidden_layers=int(rng.integers(2, depth + 1)),
        text_config=text | changes.pop("text", {}),
        vision_config=vision | changes.pop("vision", {}),
        attn_implementation="eager",
        **changes,
    )


def spread(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that distinguish layers and norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + is_scale)


def draw_inputs(rng: np.random.Generator, image_size: int):
    """Token ids with padding of several lengths, and pixels."""
    ids = torch.from_numpy(rng.integers(5, 70, size=(3, 12)))
    mask = torch.ones_like(ids)
    for row, length in enumerate(rng.integers(3, 13, size=3)):
        mask[row, length:] = 0
    ids[mask == 0] = 1
    return ids, torch.from_numpy(rng.standard_normal((3, 3, image_size, image_size), dtype=np.float32)), mask


@pytest.mark.parametrize("seed", range(NUM_CONFIGS))
@pytest.mark.parametrize("larger", [False, True])
def test_outputs_equal_bridgetowers(seed, larger):
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    outside = BridgeTowerModel(config).eval()
    spread(outside, seed)
    vision = config.vision_config
    image_size = vision.image_size + (vision.patch_size * int(rng.integers(1, 4)) if larger else 0)
    ids, pixels, mask = draw_inputs(rng, image_size)
    ours = load_bridgetower(outside, image_size)
    with torch.no_grad():
        expected = outside(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, interpolate_pos_encoding=larger, return_dict=True
        )
        actual = ours(ids, pixels, mask)
    torch.testing.assert_close(actual.text_features, expected.text_features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.image_features, expected.image_features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


def model_args(folder, image_size: int, **changes) -> ModelArgs:
    return ModelArgs(TextArgs(), VisionArgs(image_size=image_size), init=str(folder), bridge=True, **changes)


def test_a_folder_with_heads_fills_a_pretraining_model(tmp_path):
    rng = np.random.default_rng(3)
    config = draw_config(rng)
    outside = BridgeTowerForMaskedLM(config).eval()
    spread(outside, 3)
    outside.save_pretrained(tmp_path)
    args = model_args(tmp_path, config.vision_config.image_size, interaction="in_layer", dropout=0.0)
    assert args.validate() == []
    model = Unimo3ForPreTraining(args.to_config()).eval()
    set_initial_weights(model, args, seed=0)
    ids, pixels, mask = draw_inputs(rng, config.vision_config.image_size)
    with torch.no_grad():
        expected = outside(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        actual = model(ids, pixels, mask).prediction_logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_the_matching_head_is_filled_too(tmp_path):
    rng = np.random.default_rng(4)
    config = draw_config(rng)
    outside = BridgeTowerForImageAndTextRetrieval(config).eval()
    spread(outside, 4)
    outside.save_pretrained(tmp_path)
    args = model_args(tmp_path, config.vision_config.image_size, interaction="in_layer", dropout=0.0)
    model = Unimo3ForPreTraining(args.to_config()).eval()
    set_initial_weights(model, args, seed=0)
    ids, pixels, mask = draw_inputs(rng, config.vision_config.image_size)
    with torch.no_grad():
        expected = outside(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        actual = model(ids, pixels, mask).matching_logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_cross_layer_gates_start_fresh_around_a_bridgetower(tmp_path):
    config = draw_config(np.random.default_rng(5))
    outside = BridgeTowerModel(config)
    spread(outside, 5)
    outside.save_pretrained(tmp_path)
    args = model_args(tmp_path, config.vision_config.image_size, unimodal_levels=1)
    model = Unimo3ForPreTraining(args.to_config())
    set_initial_weights(model, args, seed=0)
    layer = model.unimo3.fusion.text.layers[1]
    assert layer.cross_attention.gate.num_levels == 3
    expected = outside.cross_modal_text_layers[1].intermediate.dense.weight
    assert torch.equal(layer.feed_forward.inner.weight, expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"link_tower_type": "scaled_add"}, "its link_tower_type is 'scaled_add'; only 'add'"),
        ({"share_cross_modal_transformer_layers": False}, "share_cross_modal_transformer_layers is False"),
        ({"hidden_act": "relu"}, "its hidden_act is 'relu'; only 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "text_config.layer_norm_eps is 1e-05; only 1e-06"),
        ({"vision": {"num_hidden_layers": 1}}, "vision_config.num_hidden_layers is 1, fewer"),
    ],
)
def test_unsupported_forms_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        bridgetower_config(draw_config(np.random.default_rng(0), **changes))


def test_a_missing_tensor_is_named():
    outside = BridgeTowerModel(draw_config(np.random.default_rng(1)))
    state = outside.state_dict()
    state.pop("cross_modal_text_layers.0.attention.self.key.weight")
    state["surprise"] = torch.zeros(1)
    outside.state_dict = lambda: state
    with pytest.raises(
        CheckpointError, match=r"missing: fusion\.text\.layers\.0\.self_attention\.qkv\.weight; .*: surp"
    ):
        load_bridgetower(outside)


@pytest.mark.parametrize("interaction", ["in_layer", "cross_layer"])
def test_missing_tensors_are_named_before_anything_starts(tmp_path, interaction):
    config = draw_config(np.random.default_rng(1))
    outside = BridgeTowerForMaskedLM(config)
    state = outside.state_dict()
    state.pop("bridgetower.cross_modal_text_layers.0.attention.self.key.weight")
    state.pop("mlm_score.transform.dense.bias")
    outside.save_pretrained(tmp_path, state_dict=state)
    args = model_args(tmp_path, config.vision_config.image_size, interaction=interaction)
    (problem,) = args.validate()
    assert problem.startswith(f"model.init: '{tmp_path}': its tensors do not fit Unimo3ForPreTraining; missing: ")
    assert "missing: mlm_head.dense.bias, unimo3.fusion.text.layers.0.self_attention.qkv.weight. Use" in problem
    outside.save_pretrained(tmp_path)
    assert args.validate() == []


def test_settings_that_contradict_the_folder_are_errors(tmp_path):
    config = draw_config(np.random.default_rng(1))
    BridgeTowerModel(config).save_pretrained(tmp_path)
    size = config.vision_config.image_size
    twice = ModelArgs(TextArgs(init="roberta"), VisionArgs(image_size=size), init=str(tmp_path), bridge=False)
    assert [problem.split(":")[0] for problem in twice.validate()] == ["model.text.init", "model.bridge"]
    tiny_config().text_config.save_pretrained(tmp_path)
    assert "contains a 'roberta' model; a BridgeTower one is needed" in model_args(tmp_path, size).validate()[0]
    assert "no config.json there" in model_args(tmp_path / "nowhere", size).validate()[0]


def test_another_model_is_refused_by_its_kind():
    with pytest.raises(ConfigError, match="contains a 'roberta' model; a BridgeTower one is needed"):
        load_bridgetower(RobertaModel(tiny_config().text_config))
