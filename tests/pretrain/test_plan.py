"""``python -m pretrain.plan``: what it prints, which errors it names, and that the documentation has its table."""

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain import plan
from unimo3.errors import ConfigError
from unimo3.training.plan import make

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pretrain" / "recipes"
ANSWERS = ("recipe_divides", "recipe_contrasts", "recipe_fits", "recipe_fits_with_checkpointing")


@pytest.fixture(scope="module", autouse=True)
def each_step_is_traced_once():
    """The operations of equal steps are counted once for all tests: each count takes seconds."""
    made, stock, trace = {}, plan.pretraining_step, make.trace_step

    def step(model, *settings):
        return made.setdefault((model.to_json_string(), repr(settings)), stock(model, *settings))

    costs = {}

    def cost(of_step, *how):
        key = (id(of_step), *how)
        if key not in costs:
            costs[key] = trace(of_step, *how)
        return costs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "pretraining_step", step)
        patch.setattr(make, "trace_step", cost)
        yield


def run_command(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        plan.main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr()


def test_the_command_plans_without_data_or_gpu(capsys):
    status, output = run_command(
        capsys,
        "--config",
        RECIPES / "tiny.yaml",
        "--gpus",
        2,
        "--gpu-memory",
        "40GiB",
        "--json",
        "--data.train",
        "/none",
        "--training.steps",
        36,
    )
    assert status == 0
    report = json.loads(output.out)
    assert report["ds_config"] == "zero2_bf16.json"
    assert report["recipe_ds_config"] == "zero3_fp32.json"
    assert report["machine"]["peak_flops"] == 989e12
    assert report["parameters"].pop("total") == sum(report["parameters"].values()) > 2_000_000
    sizes = {"recipe": 32, "share": 32, "largest": 32, "largest_dividing": 32, "planned": 32}
    answers = dict.fromkeys(ANSWERS, True)
    assert report["micro_batch"] == sizes | answers
    time, network = report["time"], report["network_bytes"]
    assert time["hours"] == pytest.approx(time["step_s"] / 100)
    assert time["step_s"] == pytest.approx(time["compute_s"] + time["network_s"])
    # Three times the weights of two bytes, half of which reach each of two ranks by NVLink.
    assert network["received_by_rank"] == 3 * sum(report["parameters"].values())
    assert time["network_s"] == pytest.approx(network["received_by_rank"] / 450e9)
    assert set(report["ds_config_reasons"]) == {path.name for path in (ROOT / "ds_configs").glob("*.json")}


def test_contrast_over_several_micro_steps_costs_operations_and_hours(capsys):
    def planned(num_gpus, over):
        tiny = ("--config", RECIPES / "tiny.yaml", "--gpus", num_gpus, "--objectives.itc.over", over)
        _, output = run_command(capsys, *tiny, "--json")
        return json.loads(output.out)

    # 64 pairs in micro-steps of 32: two on one GPU, one on two.
    plain, over_step = planned(1, "micro_step"), planned(1, "step")
    flops = over_step["flops_per_pair"]
    assert flops["prepare"] > 0.2 * flops["forward"]
    ratio = sum(flops.values()) / sum(plain["flops_per_pair"].values())
    assert over_step["time"]["hours"] == pytest.approx(ratio * plain["time"]["hours"])
    assert planned(2, "step")["flops_per_pair"]["prepare"] == 0


def test_a_named_ds_config_is_used_and_the_text_names_what_does_not_fit(capsys):
    status, output = run_command(
        capsys,
        "--config",
        RECIPES / "tiny.yaml",
        "--gpus",
        2,
        "--gpu-memory",
        "300MB",
        "--ds-config",
        ROOT / "ds_configs" / "zero3_fp16.json",
        "--training.global_batch",
        4096,
        "--training.micro_batch",
        2048,
    )
    assert status == 0
    assert "* zero3_fp16.json" in output.out
    assert "TFLOP/s in fp16" in output.out
    assert "the recipe's 2048 does not fit" in output.out


def test_a_micro_batch_that_does_not_divide_is_replaced(capsys):
    _, output = run_command(capsys, "--config", RECIPES / "tiny.yaml", "--gpus", 2, "--training.micro_batch", 24)
    assert (
        "the recipe's 24 does not divide the global batch over the ranks; set training.micro_batch to 32;" in output.out
    )


def test_a_single_pair_on_one_gpu_is_planned_only_without_contrast(capsys):
    tiny = ("--config", RECIPES / "tiny.yaml", "--gpus", 1, "--training.micro_batch", 1)
    _, output = run_command(capsys, *tiny)
    assert "the recipe's 1 is a single pair, which contrast and matching compare with nothing; set" in output.out
    assert "set training.micro_batch to 64;" in output.out
    status, output = run_command(capsys, *tiny, "--training.global_batch", 1)
    assert status == 78
    assert "training.micro_batch: 1: ITC and ITM draw negatives" in output.err
    alone = ("--objectives.itc.weight", 0, "--objectives.itm.weight", 0)
    status, output = run_command(capsys, *tiny, "--training.global_batch", 1, *alone)
    assert status == 0
    assert "micro-batch: the recipe's 1 fits" in output.out


def test_a_float32_plan_uses_its_peak_and_marks_the_recipes_file(capsys):
    tiny = ("--config", RECIPES / "tiny.yaml", "--gpus", 2)
    asked_for = ("--ds-config", ROOT / "ds_configs" / "zero3_fp32.json")
    _, output = run_command(capsys, *tiny, *asked_for)
    assert "40% of 67 TFLOP/s in fp32" in output.out
    assert "(the recipe's)" not in output.out
    _, output = run_command(capsys, *tiny, *asked_for, "--peak-tflops", 5)
    assert "40% of 5 TFLOP/s in fp32" in output.out
    _, output = run_command(capsys, *tiny)
    marked = [line for line in output.out.splitlines() if "(the recipe's)" in line]
    assert [line.split()[0] for line in marked] == ["zero3_fp32.json"]


def test_a_recipes_ds_config_from_elsewhere_is_preferred_in_ties(capsys, tmp_path):
    for name in ("mine.json", "zero3_bf16.json"):  # the second as one of ours is called
        path = tmp_path / name
        path.write_text((ROOT / "ds_configs" / "zero2_bf16.json").read_text())
        _, output = run_command(
            capsys, "--config", RECIPES / "tiny.yaml", "--gpus", 2, "--training.ds_config", path, "--json"
        )
        report = json.loads(output.out)
        assert report["ds_config"] == report["recipe_ds_config"] == str(path)
        reasons = report["ds_config_reasons"]
        assert reasons["zero2_bf16.json"] == f"would fit, and moves as much as {path}"
        assert reasons["zero3_bf16.json"] == "would fit, but gathers the weights in every pass"


def test_all_errors_are_reported_in_one_message(capsys):
    status, output = run_command(
        capsys,
        "--gpus",
        0,
        "--gpu-memory",
        "80 apples",
        "--mfu",
        1.5,
        "--reserve",
        1,
        "--peak-tflops",
        0,
        "--gpus-per-node",
        0,
        "--node-bandwidth",
        "nan",
        "--network-bandwidth",
        -1,
        "--overlap",
        1.5,
        "--training.steps",
        "many",
        "--objectives.mlm.weight",
        -1,
    )
    assert status == 78
    for field in ("--gpus", "--gpu-memory", "--mfu", "--reserve", "--peak-tflops", "training.steps", "mlm.weight"):
        assert field in output.err
    for line in (
        "--gpus-per-node 0: at least 1 is needed",
        "--node-bandwidth nan: a number of GB/s above 0 is needed",
        "--network-bandwidth -1: a number of GB/s above 0 is needed",
        "--overlap 1.5: a fraction from 0 to 1 is needed",
    ):
        assert line in output.err


def test_an_indivisible_global_batch_and_a_small_gpu_end_with_78(capsys):
    status, output = run_command(capsys, "--config", RECIPES / "tiny.yaml", "--gpus", 3)
    assert status == 78
    assert "training.global_batch: 64" in output.err
    status, output = run_command(capsys, "--config", RECIPES / "tiny.yaml", "--gpus", 2, "--gpu-memory", "10MB")
    assert status == 78
    assert "not even a micro-batch of one pair fits" in output.err


def test_a_tokenizer_that_exists_must_fit_the_model(tmp_path):
    from unimo3.data.tokenizer import train_tokenizer

    train_tokenizer(["a red circle", "two blue squares"], 300, tmp_path / "tokenizer")
    arguments = ["--model.text.vocab_size", "200", "--data.tokenizer", str(tmp_path / "tokenizer")]
    with pytest.raises(ConfigError, match=r"model\.text\.vocab_size: 200"):
        plan.parse_settings(arguments)


def test_settings_of_planning_are_those_of_training():
    from pretrain.train import PretrainConfig
    from unimo3 import config

    assert config.flatten_fields(plan.PlanConfig) == config.flatten_fields(PretrainConfig)
    assert [field.name for field in dataclasses.fields(plan.PlanConfig)] == [
        field.name for field in dataclasses.fields(PretrainConfig)
    ]


def documented_sizes() -> list[str]:
    """The rows of the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.split("<!-- sizes -->")[1].split("<!-- /sizes -->")[0].strip().splitlines()


def test_the_documented_sizes_are_those_of_the_recipes(capsys):
    _, output = run_command(capsys, "--table", *(RECIPES / f"{name}.yaml" for name in ("tiny", "base", "large")))
    assert documented_sizes()[:-1] == output.out.strip().splitlines()


def test_xl_needs_zero_3_on_small_cards_and_has_the_documented_size(capsys):
    _, output = run_command(capsys, "--config", RECIPES / "xl.yaml", "--gpus", 8, "--gpu-memory", "24GB", "--json")
    planned = json.loads(output.out)
    assert planned["micro_batch"]["planned"] == planned["micro_batch"]["recipe"] == 16
    assert planned["ds_config"] == "zero3_bf16.json"
    reasons = planned["ds_config_reasons"]
    assert reasons["zero2_bf16.json"].startswith("needs 25.5 GB at micro-batch 16, 21.6 GB are usable")
    for name in ("zero3_offload_cpu.json", "zero3_offload_nvme.json"):
        assert reasons[name].startswith("would fit")
    parameters, flops = planned["parameters"], planned["flops_per_pair"]["forward"]
    row = [f"{parameters[part]:,}" for part in ("text", "image", "fusion", "heads", "total")]
    assert documented_sizes()[-1].startswith(f"| `xl` | {' | '.join(row)} | {flops / 1e9:.4g} |")
