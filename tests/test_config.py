"""Settings: files and arguments, every error at once, and help that can be read."""

import os
from pathlib import Path

import pytest
import yaml

from pretrain.train import PretrainConfig
from tests.commands import start_command
from tests.data.conftest import coco, source  # noqa: F401  (fixtures)
from tests.waiting import text_of, wait_for_end
from unimo3 import config
from unimo3.errors import ConfigError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "pretrain" / "recipes" / "tiny.yaml"


def parse(*arguments):
    return config.parse(PretrainConfig, list(arguments), "pretrain.train", "")


@pytest.fixture
def good(coco):  # noqa: F811
    return ("--config", str(TINY), "--data.train", str(coco / "train"), "--data.tokenizer", str(coco / "tokenizer"))


def errors_of(*arguments):
    with pytest.raises(ConfigError) as error:
        parse(*arguments)
    return error.value.errors


def test_arguments_win_over_the_file(good):
    settings = parse(*good, "--optim.lr", "3e-4", "--run.name=12", "--data.val", "null")
    assert settings.optim.lr == 3e-4
    assert settings.run.name == "12"
    assert settings.model.hidden_size == 128


def test_a_setting_may_be_given_by_its_old_name(good, tmp_path):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("optim:\n  warmup_share: 0.3\n")
    settings = parse(*good, "--config", str(recipe), "--data.max-bad-share", "0.2")
    assert (settings.optim.warmup_ratio, settings.data.max_bad_ratio) == (0.3, 0.2)


def test_five_errors_are_five_lines_each_with_field_value_and_fix(good):
    errors = errors_of(
        *good,
        "--model.hiden_size",
        "64",
        "--optim.lr",
        "fast",
        "--model.vision.patch_size",
        "-16",
        "--training.global_batch",
        "65",
        "--objectives.mlm.weight",
        "-1",
    )
    assert len(errors) == 5
    expected = {
        "model.hiden_size": ("64", "did you mean model.hidden_size?"),
        "optim.lr": ("fast", "float"),
        "model.vision.patch_size": ("-16", "a number above 0"),
        "training.global_batch": ("65", "use 64 or 96"),
        "objectives.mlm.weight": ("-1", "0 (off) or more"),
    }
    for field, (value, fix) in expected.items():
        (line,) = [line for line in errors if line.startswith(field)]
        assert value in line
        assert fix in line


def test_a_batch_that_does_not_divide_by_the_ranks_is_named(good, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    (line,) = errors_of(*good)
    assert line.startswith("training.global_batch: 64: does not divide into micro-batches of 32 on 3 ranks; use 96")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--config", "nowhere.yaml"), "--config nowhere.yaml: cannot be read"),
        (("--data.train",), "--data.train: a value is needed after it"),
        (("train",), "argument 'train': settings are given as --group.key value"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_named(arguments, expected):
    (line,) = errors_of(*arguments)
    assert line.startswith(expected)


def test_missing_data_is_named_with_the_command_that_makes_it():
    errors = errors_of("--config", str(TINY))
    assert sorted(line.split(":")[0] for line in errors) == ["data.tokenizer", "data.train"]
    assert all("pretrain.prepare_shards" in line for line in errors)


NVME = '{"zero_optimization": {"stage": %s, "offload_optimizer": {"device": "nvme", "nvme_path": "%s"}}}'
QUANTIZED = '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3, "zero_quantized_%s": true}}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"train_batch_size": 64, "zero_optimization": {"stage": 3}}', 'set it to "auto"'),
        ('{"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}', "has 'optimizer'"),
        ('{"zero_optimization": {"stage": "auto"}}', "'stage' is \"auto\""),
        ("{", "is not JSON"),
        ("[]", "contains no JSON object"),
        ('{"fp16": true}', "an object is needed"),
        ('{"zero_optimization": 3}', "an object is needed"),
        ('{"zero_optimization": {"stage": 7}}', "DeepSpeed refuses it"),
        ('{"zero_optimization": {"stage": 0}}', "ZeRO is off"),
        ('{"zero_optimization": {"stage": 3, "overlap_com": true}}', "did you mean overlap_comm?"),
        ('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 3}}', "fp16 needs a GPU"),
        (NVME % ("2", "auto"), "DeepSpeed needs stage 3 for it"),
        (NVME % ("3", "/scratch"), "training.nvme_path decides it"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "weights on NVMe cannot be saved"),
        (QUANTIZED % "weights", "zero_quantized_weights: DeepSpeed quantizes on GPUs alone"),
        (QUANTIZED % "gradients", "reads the bits of every gradient as fp16"),
        (QUANTIZED % "nontrainable_weights", "before optim.freeze freezes; remove it"),
        ('{"zero_optimization": {"stage": 2, "zero_quantized_weights": true}}', "only stage 3 quantizes"),
    ],
)
def test_a_ds_config_that_cannot_be_used_is_named(good, tmp_path, content, expected):
    path = tmp_path / "ds.json"
    path.write_text(content)
    (line,) = errors_of(*good, "--training.ds_config", str(path))
    assert line.startswith(f"training.ds_config: '{path}'")
    assert expected in line


def test_a_folder_on_nvme_is_named_where_it_is_used_and_nowhere_else(good):
    offload = ("--training.ds_config", "ds_configs/zero3_offload_nvme.json")
    (line,) = errors_of(*good, *offload)
    assert line.startswith("training.nvme_path: '': 'ds_configs/zero3_offload_nvme.json' keeps the optimizer's states")
    (line,) = errors_of(*good, "--training.nvme_path", "/scratch")
    assert line.endswith("keeps nothing on NVMe; leave it out")
    assert parse(*good, *offload, "--training.nvme_path", "/scratch").training.nvme_path == "/scratch"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", 0),
        ("model.num_attention_heads", 0),
        ("model.num_attention_heads", 5),
        ("model.num_hidden_layers", 0),
        ("model.itc_size", 0),
        ("model.initializer_range", -1),
        ("model.itc_temperature_init", 0),
        ("model.itc_temperature_init", 7),
        ("model.dropout", 1),
        ("model.text.num_attention_heads", 0),
        ("model.text.vocab_size", -5),
        ("model.text.vocab_size", 299),
        ("model.text.num_hidden_layers", 0),
        ("model.text.intermediate_size", 0),
        ("model.text.dropout", -1),
        ("model.vision.image_size", 0),
        ("model.vision.image_size", -64),
        ("model.vision.patch_size", -16),
        ("model.vision.depth", -1),
        ("model.vision.init", "/nowhere"),
        ("model.text.init", "/nowhere"),
        ("data.max_text_tokens", 39),
        ("data.window_shards", 0),
        ("run.name", "a/b"),
        ("run.dir", ""),
        ("optim.lr", "nan"),
        ("checkpoint.keep_last", 0),
        ("training.steps", 0),
    ],
)
def test_a_value_out_of_range_is_one_line_with_field_and_value(good, key, value):
    (line,) = errors_of(*good, f"--{key}={value}")
    assert line.startswith(f"{key}: ")
    assert str(value) in line


def test_errors_of_range_and_of_fit_are_named_together(good):
    errors = errors_of(
        *good,
        "--model.num_attention_heads",
        "0",
        "--model.itc_size",
        "-1",
        "--model.gate_init",
        "2",
        "--model.num_hidden_layers",
        "0",
        "--model.vision.image_size",
        "60",
    )
    assert sorted(line.split(":")[0] for line in errors) == [
        "model.gate_init",
        "model.itc_size",
        "model.num_attention_heads",
        "model.num_hidden_layers",
        "model.vision.image_size",
    ]


@pytest.mark.parametrize(
    "change", [("vision.width", 130), ("vision.num_heads", 5), ("vision.architecture", "resnet50")], ids=lambda c: c[0]
)
def test_a_tower_that_timm_cannot_build_is_named(good, change):
    (line,) = errors_of(*good, f"--model.{change[0]}={change[1]}")
    assert line.startswith("model.vision")
    assert str(change[1]) in line


def test_print_config_names_a_bad_value_too(good):
    (line,) = errors_of(*good, "--optim.lr", "fast", "--print_config")
    assert "fast" in line


def test_a_saved_configuration_reads_back(good, tmp_path):
    settings = parse(*good)
    config.save(settings, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == settings
    assert config.read_flat(tmp_path / "config.yaml", type(settings)) == config.flatten(settings)


@pytest.mark.integration
def test_help_and_print_config_list_every_setting(tmp_path):
    def output_of(name, *arguments):
        output = tmp_path / name
        process = start_command("pretrain.train", arguments, os.environ, output)
        wait_for_end(process, name, text_of(output))
        assert process.exitcode == 0, output.read_text()
        return output.read_text()

    text = output_of("help", "--help")
    content = yaml.safe_load(output_of("printed", "--config", TINY, "--print_config"))
    assert content["model"]["hidden_size"] == 128
    for key in config.flatten_fields(PretrainConfig):
        assert f"--{key} " in text, key
        value = content
        for part in key.split("."):
            value = value[part]
    assert "Optimizer steps of the complete run" in text


def test_a_model_built_from_python_has_the_defaults_of_the_recipes():
    from unimo3.model.args import ModelArgs
    from unimo3.model.config import Unimo3Config

    ours, theirs = Unimo3Config(), ModelArgs().to_config()
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "interaction",
        "gate",
        "gate_init",
        "bridge",
        "unimodal_levels",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "itc_size",
        "itc_temperature_init",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
