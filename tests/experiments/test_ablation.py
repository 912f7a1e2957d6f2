"""The ablation end to end on toy data, and the arithmetic of its report."""

import json
import math
from dataclasses import replace
from statistics import stdev

import pytest
import torch
from PIL import Image

from experiments import ablation, ablation_run
from experiments.ablation_report import PRETRAINING, VQA, paired_difference, paired_differences, write_ablation
from experiments.ablation_settings import VARIANTS as ALL_VARIANTS
from experiments.ablation_settings import Data, Settings, option
from tests.experiments.conftest import TINY
from unimo3.drawing import width_of
from unimo3.errors import ConfigError

pytestmark = pytest.mark.xdist_group("ablation")
VARIANTS = ("in_layer", "cross_layer_token")


def arguments(work, out):
    sizes = [word for name in TINY.__dict__ for word in (option(name), str(getattr(TINY, name)))]
    return [
        "--quick",
        "--seeds",
        "0",
        "--jobs",
        "1",
        "--variants",
        *VARIANTS,
        "--work",
        str(work),
        "--out",
        str(out),
        *sizes,
    ]


def run(argv):
    with pytest.raises(SystemExit) as end:
        ablation.main(argv)
    return end.value.code


@pytest.mark.integration
def test_an_ablation_continues_after_finished_runs_and_writes_its_report(work, finished, tmp_path, capfd):
    file = finished.file(work)
    before = file.stat().st_mtime_ns
    assert run(arguments(work, tmp_path)) == 0
    assert file.stat().st_mtime_ns == before
    assert "2 runs, 1 of them done before" in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "ablation_quick.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(VARIANTS)
    assert {"loss_mlm", "loss_itm", "loss_itc", "accuracy_mlm", "accuracy_itm", "vqa_overall"} <= set(
        lines[1]["metrics"]
    )
    gates = lines[1]["gates"]["text"]
    assert [len(row) for row in gates] == [1, 2]
    assert sum(gates[1]) == pytest.approx(1, abs=1e-5)
    report = (tmp_path / "ablation_quick.md").read_text()
    assert "A quick run" in report
    assert "best guess without the image" in report
    assert Image.open(tmp_path / "ablation_quick_gates.png").size[0] > 0


def test_a_finished_run_counts_only_with_equal_settings(work, finished):
    assert finished.result(work) is not None
    longer = replace(TINY, vqa_steps=3)
    assert ablation_run.TrainingRun(longer, "in_layer", 0).result(work) is None


@pytest.mark.integration
def test_a_repeated_run_gives_the_same_metrics(work, finished):
    first = finished.result(work)
    finished.do(work)
    assert finished.result(work)["metrics"] == first["metrics"]


def test_variants_have_equal_initial_values_and_sizes(work):
    data = Data(work, TINY)
    models = {name: ablation_run.build_pretraining_model(TINY.model(name), data, 0) for name in ALL_VARIANTS}
    reference = models["in_layer"].state_dict()
    for name, model in models.items():
        values = model.state_dict()
        assert reference.keys() <= values.keys(), name
        for key, value in reference.items():
            torch.testing.assert_close(values[key], value, rtol=0, atol=0)
    assert any("bridge_norms" in key for key in models["bridge"].state_dict())


def test_vqa_starts_from_the_pretrained_towers_and_fusion(work):
    pretrained = ablation_run.build_pretraining_model(TINY.model("bridge"), Data(work, TINY), 0)
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.add_(0.125)
    model = ablation_run.build_vqa_model(pretrained, 7, seed=0)
    for key, value in pretrained.unimo3.state_dict().items():
        torch.testing.assert_close(model.unimo3.state_dict()[key], value, rtol=0, atol=0)
    assert model.config.num_answers == 7


def test_variants_of_unequal_size_are_refused(capsys):
    small = Settings(width=8, layers=8)
    with pytest.raises(ConfigError, match="cross_layer_token has"):
        ablation.check_sizes(small)
    assert "in_layer: " in capsys.readouterr().out


def test_all_bad_settings_are_named_at_once(tmp_path, capsys):
    argv = [
        "--batch",
        "0",
        "--vqa-lr",
        "-1",
        "--seeds",
        "1",
        "1",
        "--variants",
        "bridge",
        "sideways",
        "--only",
        "in_layer",
    ]
    assert run(argv) == 78
    message = capsys.readouterr().err
    for part in (
        "--batch 0",
        "--vqa-lr -1",
        "--seeds [1, 1]",
        "--variants sideways",
        "in_layer, which",
        "--only in_layer",
    ):
        assert part in message


def test_an_error_of_all_variants_is_reported_once():
    (problem,) = replace(TINY, image_size=33).validate()
    assert problem.startswith("model.vision.image_size: 33: not a multiple of the patch size 16")


def test_the_paired_interval_is_students():
    difference = paired_difference([0.01, 0.03, 0.02])
    assert difference.mean == pytest.approx(0.02)
    assert difference.half_width == pytest.approx(4.303 * stdev([0.01, 0.03, 0.02]) / math.sqrt(3))
    assert not difference.excludes_zero
    assert paired_difference([0.019, 0.021, 0.020]).excludes_zero
    assert math.isnan(paired_difference([0.5]).half_width)
    assert not paired_difference([0.5]).excludes_zero


def result(variant, seed, shift):
    metrics = dict.fromkeys(PRETRAINING | VQA, 0.5 + seed / 10 + shift)
    gates = None if variant in ("in_layer", "bridge") else [[1.0], [0.25 + seed / 4, 0.75 - seed / 4]]
    if variant == "with_towers":
        gates = [[0.25, 0.25, 0.5], [0.25] * 4]
    return {
        "variant": variant,
        "seed": seed,
        "settings": {"batch": 64},
        "metrics": metrics,
        "parameters": 100,
        "gates": {"text": gates, "image": gates},
        "pretraining": {"step_s": 1.0},
        "vqa": {"step_s": 0.5},
        "model": {"gate_init": 0.5 if variant.endswith("even") else 0.9},
        "machine": {"commit": "abc"},
    }


def test_differences_are_taken_within_a_seed():
    results = [result("in_layer", 1, 0), result("in_layer", 0, 0), result("x", 1, 0.03), result("x", 0, 0.01)]
    assert paired_differences(results, "x", "in_layer", "loss_mlm") == pytest.approx([0.01, 0.03])


@pytest.mark.integration
def test_the_report_names_the_clear_differences(tmp_path):
    results = [result("in_layer", seed, 0) for seed in range(3)]
    results += [result("x", seed, 0.02 + seed / 1000) for seed in range(3)]
    blind = {"overall": 0.4, "fine": 0.3, "object": 0.5, "scene": 0.45}
    write_ablation(tmp_path / "a.md", results, blind, is_quick=False)
    report = (tmp_path / "a.md").read_text()
    assert "| in_layer | 0.6000 ± 0.1000 |" in report
    assert "| MLM loss | x | +0.0210 ± 0.0025 | +0.0200, +0.0210, +0.0220 |" in report
    assert "Of 9 differences 9 have an interval that excludes zero" in report
    assert "| best guess without the image | 0.4000 | 0.3000 | 0.5000 | 0.4500 |" in report
    assert "quick" not in report.split("## Measured on")[0].split("\n", 4)[4]
    assert "Highest mean of VQA overall among variants of equal size: x (0.6210), then in_layer (0.6000)." in report
    assert "it starts at 0.9 and the others" in report
    assert (tmp_path / "a_gates.png").exists()


@pytest.mark.integration
def test_variants_with_bridges_are_compared_with_the_bridges_alone_too(tmp_path):
    shifts = {"in_layer": 0.0, "bridge": 0.02, "cross_layer_bridge": 0.05, "cross_layer_bridge_even": 0.01}
    results = [result(name, seed, shift) for name, shift in shifts.items() for seed in range(2)]
    write_ablation(tmp_path / "a.md", results, dict.fromkeys(("overall", "fine", "object", "scene"), 0), False)
    to_bridge = (tmp_path / "a.md").read_text().split("## Paired differences to bridge")[1].split("## Size")[0]
    assert "| VQA overall | cross_layer_bridge | +0.0300" in to_bridge
    assert "| VQA overall | cross_layer_bridge_even | -0.0100" in to_bridge
    assert "in_layer" not in to_bridge


@pytest.mark.integration
def test_a_larger_variant_is_not_among_the_winners(tmp_path):
    results = [result("in_layer", 0, 0), result("larger", 0, 0.2) | {"parameters": 103}, result("x", 0, 0.1)]
    write_ablation(tmp_path / "a.md", results, dict.fromkeys(("overall", "fine", "object", "scene"), 0), False)
    assert "equal size: x (0.6000), then in_layer (0.5000)." in (tmp_path / "a.md").read_text()


@pytest.mark.integration
def test_tower_layers_have_separate_columns(tmp_path):
    widths, longest = [], []
    for variants in (["in_layer", "x"], ["in_layer", "x", "with_towers"]):
        results = [result(name, 0, 0) for name in variants]
        write_ablation(tmp_path / "a.md", results, dict.fromkeys(("overall", "fine", "object", "scene"), 0), False)
        widths.append(Image.open(tmp_path / "a_gates.png").size[0])
        longest.append(max(width_of(f"{name}: image reads text", 15) for name in variants[1:]) + 24)
    # Two maps next to each other, of two and of four levels, each at least as wide as its title.
    assert widths[1] - widths[0] == 2 * (max(4 * 56, longest[1]) - max(2 * 56, longest[0]))


@pytest.mark.integration
def test_without_gates_there_is_no_picture(tmp_path):
    results = [result(name, 0, 0) for name in ("in_layer", "bridge")]
    write_ablation(tmp_path / "a.md", results, dict.fromkeys(("overall", "fine", "object", "scene"), 0), False)
    assert not (tmp_path / "a_gates.png").exists()
    assert "significance is unknown" in (tmp_path / "a.md").read_text()
