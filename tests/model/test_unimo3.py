"""The assembled model: saving, loading, tying, seeded initialization, errors, documented sizes."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, CLIPConfig, CLIPModel, RobertaConfig, RobertaForMaskedLM

from tests.tiny import tiny_batch, tiny_config, tiny_pretraining_model
from unimo3 import config
from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.args import ModelArgs
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.initialization import initialize_weights
from unimo3.model.pretrained import load_exported, load_text, load_vision
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3Model

RECIPES = Path(__file__).parents[2] / "pretrain" / "recipes"
# Documented in docs/architecture.md; weights, with the tied MLM decoder counted once.
NUM_PARAMETERS = {"tiny": 3_056_555, "base": 327_164_732, "large": 865_751_260, "xl": 4_798_332_572}


def inputs():
    batch = tiny_batch(3)
    return batch["input_ids"], batch["pixel_values"], batch["attention_mask"]


@pytest.mark.parametrize("changes", [{}, {"gate": "static"}, {"interaction": "in_layer"}])
def test_saved_and_loaded_models_agree_exactly(tmp_path, changes):
    model = tiny_pretraining_model(**changes).eval()
    model.save_pretrained(tmp_path)
    again = Unimo3ForPreTraining.from_pretrained(tmp_path).eval()
    assert torch.equal(again(*inputs()).prediction_logits, model(*inputs()).prediction_logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, Unimo3Model)
    assert torch.equal(base(*inputs()).pooler_output, model.unimo3(*inputs()).pooler_output)


def test_the_mlm_decoder_is_tied_unless_set_otherwise(tmp_path):
    tied = tiny_pretraining_model()
    assert tied.mlm_head.decoder.weight is tied.unimo3.get_input_embeddings().weight
    untied = tiny_pretraining_model(tie_word_embeddings=False)
    assert untied.mlm_head.decoder.weight is not untied.unimo3.get_input_embeddings().weight


def test_initial_weights_depend_on_the_seed_and_the_name_alone():
    one, same, other = (tiny_pretraining_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "unimo3.fusion.text.layers.0.self_attention.qkv.weight"
    assert not torch.equal(one[name], other[name])
    uncrossed = tiny_pretraining_model(0, interaction="in_layer").state_dict()
    assert all(torch.equal(one[name], uncrossed[name]) for name in uncrossed)


def test_an_answer_head_needs_answers():
    with pytest.raises(ConfigError, match="num_answers: 0"):
        Unimo3ForVisualQuestionAnswering(tiny_config())


def test_all_errors_of_a_configuration_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        Unimo3Model(
            tiny_config(
                vision_config={"image_size": 20, "overrides": {"patch_size": 8}},
                num_attention_heads=5,
                num_hidden_layers=0,
                gate="loud",
                gate_init=1.0,
            )
        )
    fields = [problem.split(":")[0] for problem in error.value.errors]
    assert fields == [
        "model.vision.image_size",
        "model.num_attention_heads",
        "model.num_hidden_layers",
        "model.gate",
        "model.gate_init",
    ]
    assert "16 or 24" in error.value.errors[0]


@pytest.mark.parametrize("recipe", sorted(NUM_PARAMETERS))
def test_every_recipe_builds_on_the_meta_device_with_the_documented_size(recipe):
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["model"]
    text, vision = settings.pop("text"), settings.pop("vision")
    defaults = ModelArgs()
    args = ModelArgs(type(defaults.text)(**text), type(defaults.vision)(**vision), **settings)
    assert config.collect_errors(args) == []
    with torch.device("meta"):
        model = Unimo3ForPreTraining(args.to_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[recipe]


def test_every_recipe_has_a_documented_size():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(NUM_PARAMETERS)


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    sizes = tiny_config().text_config.to_diff_dict()
    RobertaForMaskedLM(RobertaConfig(**sizes)).save_pretrained(folder)
    return folder


def test_a_roberta_folder_fills_the_text_tower(roberta_folder):
    outside = RobertaForMaskedLM.from_pretrained(roberta_folder).eval()
    model = tiny_pretraining_model().eval()
    load_text(model.unimo3.text_tower, str(roberta_folder))
    ids, _, mask = inputs()
    expected = outside.roberta(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.unimo3.encode_text(ids, mask)[:, -1], expected, atol=0, rtol=0)


@pytest.mark.parametrize("image_size", [16, 24])
def test_a_clip_folder_fills_the_image_tower_also_at_another_resolution(tmp_path, image_size):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    outside = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in outside.vision_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    outside.save_pretrained(tmp_path)
    model = tiny_pretraining_model(
        vision_config={
            "image_size": image_size,
            "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        }
    ).eval()
    load_vision(model.unimo3.vision_tower, str(tmp_path))
    pixels = torch.randn(2, 3, image_size, image_size)
    states = outside.vision_model(pixel_values=pixels, interpolate_pos_encoding=image_size != 16).last_hidden_state
    expected = outside.vision_model.post_layernorm(states)
    torch.testing.assert_close(model.unimo3.encode_image(pixels)[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_weights_that_do_not_fit_are_named(tmp_path, roberta_folder):
    with pytest.raises(CheckpointError, match=r"of another shape: roberta\.embeddings"):
        load_text(
            tiny_pretraining_model(
                text_config={**tiny_config().text_config.to_diff_dict(), "hidden_size": 64, "num_hidden_layers": 2}
            ).unimo3.text_tower,
            str(roberta_folder),
        )
    with pytest.raises(ConfigError, match=r"model\.vision\.init: .* contains a 'roberta' model; one of CLIP, SigLIP, "):
        load_vision(tiny_pretraining_model().unimo3.vision_tower, str(roberta_folder))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors there, nor its index"):
        load_exported(tiny_pretraining_model(), str(tmp_path))


def test_exported_weights_fill_another_head_around_the_same_model(tmp_path):
    source = tiny_pretraining_model(seed=1)
    source.save_pretrained(tmp_path)
    target = Unimo3ForVisualQuestionAnswering(tiny_config(num_answers=4))
    initialize_weights(target, 0)
    load_exported(target, str(tmp_path), fresh=r"^vqa_head\.")
    for name, parameter in target.unimo3.named_parameters():
        assert torch.equal(parameter, source.unimo3.get_parameter(name)), name
    with pytest.raises(CheckpointError, match=r"missing: vqa_head"):
        load_exported(target, str(tmp_path))
