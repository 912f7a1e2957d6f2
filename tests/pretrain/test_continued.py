"""A new run that starts from the weights of this project's own model: what is used, and what is refused."""

import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from pretrain.train import PretrainConfig
from tests.s3 import URL, s3, s3_server  # noqa: F401  (two are fixtures)
from tests.tiny import tiny_config
from unimo3.checkpoint import store
from unimo3.checkpoint.initial_weights import weights_of
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer, train_tokenizer
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs, set_initial_weights
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.initialization import initialize_weights
from unimo3.model.tokenizer_checks import resolve_tokens
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.run import RunArgs

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TextArgs(vocab_size=400, intermediate_size=64, max_position_embeddings=20, **SIZES)
VISION = VisionArgs(image_size=32, patch_size=16, width=32, depth=2, num_heads=2)
RECIPE = ModelArgs(TEXT, VISION, itc_size=16, **SIZES)
TABLE = "unimo3.vision_tower.vit.pos_embed"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red square on a blue circle"], 300, folder)
    return folder


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    config = RECIPE.to_config()
    resolve_tokens(config, load_tokenizer(str(tokenizer)))
    model = Unimo3ForPreTraining(config)
    initialize_weights(model, seed=3)
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def settings_of(init, tokenizer, folder, model=RECIPE, max_text_tokens=16):
    return PretrainConfig(
        run=RunArgs(name="new", dir=str(folder)),
        model=replace(model, init=str(init)),
        data=DataArgs(tokenizer=str(tokenizer), max_text_tokens=max_text_tokens),
    )


def errors_of(settings):
    return settings.model_in_run().validate() or settings.slow_errors()


@pytest.mark.parametrize("image_size", [32, 48])
def test_weights_are_those_of_the_export_at_any_image_size(exported, tokenizer, tmp_path, image_size):
    args = replace(RECIPE, vision=replace(VISION, image_size=image_size), dropout=0.3)
    settings = settings_of(exported, tokenizer, tmp_path, args)
    assert errors_of(settings) == []
    config = settings.model_in_run().to_config()
    assert (config.vision_config.image_size, config.hidden_dropout_prob) == (image_size, 0.3)
    model, source = Unimo3ForPreTraining(config), Unimo3ForPreTraining.from_pretrained(exported)
    set_initial_weights(model, settings.model_in_run(), seed=0)
    differing = [n for n, value in model.named_parameters() if not value.equal(source.get_parameter(n))]
    assert differing == ([] if image_size == 32 else [TABLE])


def test_weights_and_runs_in_a_store_are_checked_by_their_configuration(s3, exported, tokenizer, tmp_path):  # noqa: F811
    for path in exported.iterdir():
        s3.put(f"continued/exported/{path.name}", path.read_bytes())
        s3.put(f"continued/run/model/{path.name}", path.read_bytes() if path.suffix == ".json" else b"")
    s3.put(f"continued/run/checkpoints/step_00000002/{store.MANIFEST}", b"{}")
    for init in (f"{URL}/continued/exported", f"{URL}/continued/run", f"{URL}/continued/run/checkpoints/step_00000002"):
        assert errors_of(settings_of(init, tokenizer, tmp_path)) == []
    other = replace(RECIPE, interaction="in_layer")
    (error,) = errors_of(settings_of(f"{URL}/continued/exported", tokenizer, tmp_path, other))
    assert error == "model.interaction: in_layer: the weights of model.init have cross_layer; leave it out"
    settings = settings_of(f"{URL}/continued/exported", tokenizer, tmp_path)
    folder = weights_of(settings.model.init, settings.run.folder, field="model.init")
    assert errors_of(settings) == []
    model, source = Unimo3ForPreTraining(settings.model_in_run().to_config()), load_file(exported / "model.safetensors")
    set_initial_weights(model, replace(settings.model, init=folder), seed=0)
    assert all(model.get_parameter(name).equal(value) for name, value in source.items() if "unimo3." in name)


def test_settings_that_contradict_the_weights_are_refused(exported, tokenizer, tmp_path):
    sizes_of_weights = ModelArgs(vision=VisionArgs(image_size=32))
    assert errors_of(settings_of(exported, tokenizer, tmp_path, sizes_of_weights)) == []
    other = replace(RECIPE, interaction="in_layer", text=replace(TEXT, vocab_size=500), vision=replace(VISION, depth=3))
    assert errors_of(settings_of(exported, tokenizer, tmp_path, other)) == [
        "model.interaction: in_layer: the weights of model.init have cross_layer; leave it out",
        "model.text.vocab_size: 500: the weights of model.init have 400; leave it out",
        "model.vision.depth: 3: the weights of model.init have 2; leave it out",
    ]


def test_another_vocabulary_is_refused(exported, tmp_path):
    train_tokenizer(["ein anderer Satz"], 300, tmp_path / "other")
    (error,) = errors_of(settings_of(exported, tmp_path / "other", tmp_path))
    assert error == (
        f"data.tokenizer: '{tmp_path / 'other'}': has another vocabulary than the weights of model.init were trained "
        f"with; use {exported}"
    )


def test_a_longer_text_needs_positions(exported, tokenizer, tmp_path):
    assert errors_of(settings_of(exported, tokenizer, tmp_path, max_text_tokens=18)) == []
    (error,) = errors_of(settings_of(exported, tokenizer, tmp_path, max_text_tokens=19))
    assert error.startswith("data.max_text_tokens: 19: model.text.max_position_embeddings 20 allows 18")


def test_an_image_size_that_does_not_divide_into_patches_is_refused(exported, tokenizer, tmp_path):
    model = replace(RECIPE, vision=replace(VISION, image_size=40))
    (error,) = errors_of(settings_of(exported, tokenizer, tmp_path, model))
    assert error.startswith("model.vision.image_size: 40: not a multiple of the patch size 16")


def test_what_is_no_pretrained_model_of_this_project_is_named(tokenizer, tmp_path):
    Unimo3ForVisualQuestionAnswering(tiny_config(num_answers=3)).save_pretrained(tmp_path / "vqa")
    (error,) = errors_of(settings_of(tmp_path / "vqa", tokenizer, tmp_path))
    assert error.startswith(f"model.init: '{tmp_path}/vqa': contains weights of Unimo3ForVisualQuestionAnswering")
    (error,) = errors_of(settings_of(tmp_path / "gone", tokenizer, tmp_path))
    assert error.startswith(f"model.init: '{tmp_path}/gone': no config.json there; name a run, one of its checkpoints")


def test_an_export_without_a_tokenizer_is_refused(exported, tokenizer, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(exported / name, tmp_path)
    (error,) = errors_of(settings_of(tmp_path, tokenizer, tmp_path))
    assert error.startswith(f"model.init: '{tmp_path}': contains no tokenizer; name a folder that")


def test_a_run_is_checked_by_its_configuration_until_it_begins(exported, tokenizer, tmp_path):
    run = tmp_path / "source"
    shutil.copytree(exported, run / "model")
    (run / "model" / "model.safetensors").unlink()
    checkpoint = store.folder_of(run) / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / store.STATE).touch()
    for init in (run, checkpoint):
        settings = settings_of(init, tokenizer, tmp_path)
        assert errors_of(settings) == []
        assert settings.model_in_run().init == str(run / "model")
    # Once the new run has a checkpoint, the source may go.
    shutil.copytree(run, settings.run.folder)
    shutil.rmtree(run)
    assert errors_of(settings) == []
    assert settings.model_in_run().init == str(settings.run.folder / "model")
