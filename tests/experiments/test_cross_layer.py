"""The experiment on cross-layer interaction in miniature: its runs, how they continue, and the report's arithmetic."""

import importlib
import json
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from PIL import Image, ImageFont
from torch.nn.modules.module import register_module_forward_pre_hook

from experiments import cross_layer, pictures
from experiments.cross_layer_plan import (
    COMPARED,
    SEEDS,
    SETTINGS,
    Comparison,
    Run,
    append_line,
    comparisons,
    read_lines,
    settings_from,
)
from experiments.cross_layer_report import check, compare_variants, differences, write_cross_layer
from experiments.peer import PEER, PeerPretrainingLoss
from experiments.picture_retrieval import PictureRetrieval, PictureSettings
from experiments.toy_vqa import ToyVqa, ToyVqaSettings
from experiments.training import build_downstream_model, build_pretraining_model
from experiments.variants import VARIANTS
from unimo3.data.index import ShardIndex
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.objectives.base import PretrainingLoss

SIZES = {"image_size": 32, "layers": 2, "width": 32, "pretraining_steps": 2, "batch": 8}
TINY = {"toy_vqa": SIZES | {"images": 60, "tuning_steps": 2}, "pictures": SIZES | {"vocabulary": 300, "gallery": 3}}
PICTURES = PictureSettings(**TINY["pictures"])
LETTERS = "ABCDEFGHJKLMNOPQRSTUVXYZ"


def status_of(main, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def run(*words):
    return status_of(cross_layer.main, *words)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Toy data and letters as pictures."""
    folder = tmp_path_factory.mktemp("cross_layer")
    (folder / "letters.ttf").write_bytes(ImageFont.load_default(20).path.getvalue())
    names = "".join(f'<annotation cp="{letter}" type="tts">letter {letter}</annotation>' for letter in LETTERS)
    (folder / "en.xml").write_text(f"<ldml><annotations>{names}</annotations></ldml>")
    words = ["--kinds", "noto", "--font", folder / "letters.ttf", "--annotations", folder / "en.xml"]
    assert not status_of(pictures.main, folder / "emoji", *words)
    data_sets = ToyVqa(folder, ToyVqaSettings(**TINY["toy_vqa"])), PictureRetrieval(folder, PICTURES)
    for made, (module, *arguments) in (command for data_set in data_sets for command in data_set.commands()):
        if not made.exists():  # in this process, which has imported everything
            assert not status_of(importlib.import_module(module).main, *arguments)
    return folder


@pytest.fixture(scope="module")
def finished(work, tmp_path_factory):
    """A file of results with both data sets, of one seed."""
    results = tmp_path_factory.mktemp("results") / "results.jsonl"
    words = ["--work", work, "--results", results, "--settings", json.dumps(TINY), "--seeds", "7"]
    assert not run("run", *words, "--variants", "bridge", "cross_layer_bridge", "--jobs", "0")
    return results, words


@pytest.mark.integration
def test_a_run_is_a_line_with_metrics_gates_and_what_forcing_costs(finished):
    results, _ = finished
    lines = read_lines(results)
    of = {(line["data_set"], line["variant"]): line for line in lines}
    assert len(of) == len(lines) == 4
    gated, ungated = of["toy_vqa", "cross_layer_bridge"], of["toy_vqa", "bridge"]
    assert {"vqa_overall", "vqa_fine", "vqa_object", "vqa_scene", "loss_mlm", "accuracy_itm"} <= gated["metrics"].keys()
    assert gated["gates"].keys() == {"overall", "fine", "object", "scene"}
    for streams in gated["gates"].values():
        for layers in streams.values():
            assert [len(levels) for levels in layers] == [1, 2]
            assert sum(layers[1]) == pytest.approx(1, abs=1e-4)
    assert gated["forced"].keys() == {"partner", "level 0"}
    assert ungated["gates"] == ungated["forced"] == {}
    retrieval = of["pictures", "cross_layer_bridge"]
    both = retrieval["metrics"]["tr_at_1"] + retrieval["metrics"]["ir_at_1"]
    assert retrieval["metrics"]["recall_at_1"] == pytest.approx(both / 2)
    assert retrieval["metrics"]["auc"] == pytest.approx(
        sum(retrieval["metrics"][f"{way}_auc"] for way in ("tr", "ir")) / 2
    )
    assert retrieval["metrics"]["auc"] != retrieval["metrics"]["recall_at_1"]
    assert retrieval["gates"].keys() == {"overall", "pairs"}
    assert retrieval["data"] == of["pictures", "bridge"]["data"] != gated["data"]
    assert "commit" in retrieval["machine"]


@pytest.mark.integration
def test_the_peer_learns_from_a_variants_batches_to_a_line_of_its_form(work, finished, tmp_path):
    results, words = finished
    # Its image heads are 64 wide.
    settings = SIZES | {"width": 64, "images": 60, "pretraining_steps": 12, "tuning_steps": 8}
    settings |= {"pretraining_lr": 2e-3, "tuning_lr": 2e-3}
    batches = {PretrainingLoss: [], PeerPretrainingLoss: []}

    def note(module, inputs):
        if type(module) in batches:
            batches[type(module)].append(inputs[0])

    hook = register_module_forward_pre_hook(note)
    try:
        changed = ["--data-sets", "toy_vqa", "--settings", json.dumps({"toy_vqa": settings}), "--jobs", "0"]
        words = ["run", *words, *changed, "--results", tmp_path / "r.jsonl", "--variants"]
        assert not run(*words, PEER)
        # It is not done again.
        assert not run(*words, PEER)
        ToyVqa(work, ToyVqaSettings(**settings)).pretrain("bridge", 7, ImageTransform(32))
    finally:
        hook.remove()
    ours, theirs = batches.values()
    assert len(ours) == len(theirs) > 12
    for our, their in zip(ours, theirs, strict=True):
        for name in ("mlm_input_ids", "mlm_labels", "pixel_values", "positions"):
            assert torch.equal(our[name], their[name])
    (peer,) = read_lines(tmp_path / "r.jsonl")
    variant = next(one for one in read_lines(results) if one["variant"] == "bridge")
    assert peer.keys() == variant.keys()
    assert peer["metrics"].keys() == variant["metrics"].keys()
    assert peer["interaction"]["vision_config"]["hidden_size"] == 64
    assert peer["gates"] == peer["forced"] == {}
    for stage in ("pretraining", "tuning"):
        losses = peer["training"][stage]["loss_by_tenth"]
        assert losses[-1] < 0.9 * losses[0], stage


@pytest.mark.integration
def test_a_stopped_experiment_continues_with_the_runs_that_are_missing(finished, capfd):
    results, words = finished
    before = results.read_text()
    wanted = ("--variants", "bridge", "cross_layer_bridge", "--data-sets", "pictures")
    # The line of one run is lost.
    results.write_text("".join(before.splitlines(keepends=True)[:-1]))
    assert not run("run", *words, *wanted, "--jobs", "2")
    assert "2 runs, 1 of them done before" in capfd.readouterr().out
    again, lost = (json.loads(text.splitlines()[-1]) for text in (results.read_text(), before))
    # The same seed gives the same metrics, in another process too.
    assert again["metrics"] == lost["metrics"]
    assert again["forced"] == lost["forced"]


@pytest.mark.integration
def test_a_run_that_diverges_counts_as_a_guess(work, tmp_path):
    results = tmp_path / "r.jsonl"
    settings = json.dumps({"pictures": TINY["pictures"] | {"pretraining_lr": 1e30, "pretraining_steps": 20}})
    words = ["run", "--data-sets", "pictures", "--variants", "bridge", "--seeds", "7", "--jobs", "0", "--work", work]
    assert not run(*words, "--settings", settings, "--results", results)
    (diverged,) = read_lines(results)
    assert diverged["metrics"] == {"auc": 0.5}
    assert "pictures bridge seed 7: pretraining: loss nan at step" in diverged["diverged"]
    # It is not done again.
    assert not run(*words, "--settings", settings, "--results", results)
    assert len(read_lines(results)) == 1
    write_cross_layer(write(results, [diverged, line("bridge", 7, 0.5)]))
    assert "at step" in results.with_suffix(".md").read_text()


@pytest.mark.integration
def test_the_report_of_finished_runs_names_what_was_done(finished, tmp_path):
    results, _ = finished
    copy = tmp_path / "copy.jsonl"
    copy.write_text(results.read_text())
    assert not run("report", "--results", copy)
    report = (tmp_path / "copy.md").read_text()
    assert "## Forced gates" in report
    assert "| toy_vqa | cross_layer_bridge | level 0 |" in report
    assert Image.open(tmp_path / "copy_gates.png").size[0] > 0


def test_the_designed_runs_of_each_data_set_are_the_default(work, tmp_path, capsys):
    settings = settings_from(json.dumps(TINY))
    lines = [
        Run("run", name, variant, seed).identity(settings[name]) | {"metrics": {}}
        for name, seeds in SEEDS.items()
        for variant, seed in product(COMPARED, seeds)
    ]
    results = write(tmp_path / "r.jsonl", lines)
    assert not run("run", "--work", work, "--results", results, "--settings", json.dumps(TINY))
    assert "88 runs, 88 of them done before" in capsys.readouterr().out


def test_pictures_have_the_kind_of_their_file_and_the_settings_dropout(work):
    data_set = PictureRetrieval(work, PICTURES)
    assert {*data_set._kinds(ShardIndex(data_set.shards / "val"))} == {"noto"}
    assert data_set.commands()[0][1][-3:] == ["noto", "emoji_one", "emojify"]
    assert SETTINGS["pictures"].model("bridge").dropout == SETTINGS["pictures"].model("bridge").text.dropout == 0.1
    assert replace(SETTINGS["pictures"], dropout=0.0).validate() == []
    with pytest.raises(DataError, match=r"emoji_1f34e_3.png: its name begins with none of noto, emoji_one"):
        pictures.kind_of("emoji_1f34e_3.png")


def test_a_line_counts_only_for_equal_settings_and_stage(tmp_path):
    settings = SETTINGS["pictures"]
    one = Run("run", "pictures", "bridge", 3)
    append_line(tmp_path / "r.jsonl", one.identity(settings) | {"metrics": {}})
    lines = read_lines(tmp_path / "r.jsonl")
    assert one.is_done(settings, lines)
    assert not one.is_done(replace(settings, crop_scale=1), lines)
    for other in ({"stage": "pilot"}, {"seed": 4}, {"variant": "in_layer"}, {"data_set": "toy_vqa"}):
        assert not Run(**(asdict(one) | other)).is_done(settings, lines)


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"b":\n')
    with pytest.raises(DataError, match=r"r.jsonl: line 2: cannot be read"):
        read_lines(tmp_path / "r.jsonl")


def test_variants_have_equal_initial_values(work):
    settings = ToyVqaSettings(**TINY["toy_vqa"])
    tokenizer = ToyVqa(work, settings).tokenizer()
    models = {name: build_pretraining_model(settings.model(name), tokenizer, 0) for name in VARIANTS}
    reference = models["in_layer"].state_dict()
    for name, model in models.items():
        values = model.state_dict()
        assert reference.keys() <= values.keys(), name
        for key, value in reference.items():
            torch.testing.assert_close(values[key], value, rtol=0, atol=0)
    pretrained = models["bridge"]
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.add_(0.125)
    tuned = build_downstream_model(Unimo3ForVisualQuestionAnswering, pretrained, 0, num_answers=7)
    for key, value in pretrained.unimo3.state_dict().items():
        torch.testing.assert_close(tuned.unimo3.state_dict()[key], value, rtol=0, atol=0)
    assert tuned.config.num_answers == 7


def test_sizes_of_the_defaults_compare_and_small_ones_do_not():
    assert SETTINGS["toy_vqa"].size_errors([*VARIANTS, PEER]) == SETTINGS["pictures"].size_errors(COMPARED) == []
    (problem,) = replace(SETTINGS["pictures"], width=8, layers=8).size_errors(["in_layer", "cross_layer_bridge"])
    assert "cross_layer_bridge has +" in problem
    (problem,) = replace(SETTINGS["toy_vqa"], width=32).size_errors(["bridge", PEER])
    assert problem == "width 32: bridgetower's image heads are 64 wide; a multiple of that is needed"


def test_all_bad_words_are_named_at_once(tmp_path, capsys):
    assert run("run", "--variants", PEER, "sideways", "--seeds", "1", "1", "--jobs", "-1") == 78
    message = capsys.readouterr().err
    for part in ("--variants sideways", "bridgetower: runs on toy_vqa alone", "--seeds 1 1", "--jobs -1"):
        assert part in message
    wrong = {"pictures": {"batch": 0, "pretraining_lr": -1}, "toy_vqa": {"image_size": 33}}
    assert run("pilot", "--settings", json.dumps(wrong), "--work", tmp_path) == 78
    message = capsys.readouterr().err
    for part in (
        "pictures: batch 0",
        "pictures: pretraining_lr -1",
        "toy_vqa: model.vision.image_size: 33: not a multiple",
    ):
        assert part in message
    assert run("run", "--settings", '{"pictures": {"steps": 1}}', "--work", tmp_path) == 78
    assert "pictures.steps is unknown" in capsys.readouterr().err
    assert run("run", "--settings", '{"pictures": {"crop_scale": 2.0}}', "--work", tmp_path) == 78
    assert "crop_scale 2.0: 1 at most" in capsys.readouterr().err
    assert run("run", "--settings", "[1]", "--work", tmp_path) == 78
    assert run("report", "--results", tmp_path / "none.jsonl") == 78
    assert "has no runs" in capsys.readouterr().err


def line(variant, seed, value, stage="run", data_set="toy_vqa", forced=None):
    primary = {"toy_vqa": "vqa_overall", "pictures": "auc"}[data_set]
    gates = {name: {stream: [[1.0], [0.25, 0.75]] for stream in ("text", "image")} for name in ("overall", "fine")}
    return {
        **Run(stage, data_set, variant, seed).identity(SETTINGS[data_set]),
        "data": "d",
        "metrics": {primary: value},
        "gates": gates if forced else {},
        "forced": {"partner": value - forced} if forced else {},
        "parameters": 100,
        "training": {"pretraining": {"step_s": 1.0}, "tuning": {"step_s": 0.5}},
        "seconds": 3.0,
        "machine": {"commit": "abc"},
    }


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_variants_are_tested_within_a_seed_and_corrected_together():
    lines = [line("in_layer", seed, 0.5 + seed / 10 - seed % 2 / 1000) for seed in range(4)]
    lines += [line("bridge", seed, 0.51 + seed / 10 + seed / 1000) for seed in range(4)]
    # Two seeds are missing here, and one there.
    lines += [line("cross_layer_bridge", seed, 0.53 + seed / 10) for seed in (0, 1, 2, 9)]
    # The peer is shown, not tested.
    lines += [line(PEER, seed, 0.25 + seed / 10) for seed in range(4)]
    to_reference = Comparison("toy_vqa", "cross_layer_bridge", "in_layer")
    assert differences(lines, to_reference, "vqa_overall") == pytest.approx([0.03, 0.031, 0.03])
    (to_bridge, num_seeds, test, corrected), (to_in_layer, _, clear, clear_corrected) = compare_variants(lines)
    assert (to_bridge.reference, to_in_layer.reference) == ("bridge", "in_layer")
    assert num_seeds == 3
    assert test.mean == pytest.approx(0.019)
    # Holm: the smaller p-value counts twice, the larger once.
    assert 0 < clear.p < test.p == corrected
    assert clear_corrected == 2 * clear.p


@pytest.mark.integration
def test_nothing_is_tested_before_all_runs_are_done(tmp_path):
    lines = [line(PEER, seed, 0.4 + seed % 2 / 10) for seed in SEEDS["toy_vqa"]]
    # Runs that are not of the design are shown, not tested.
    lines += [line(variant, 1, 0.9 - number, forced=0.25) for number, variant in enumerate(COMPARED)]
    for data_set, seeds in SEEDS.items():
        for (number, variant), seed in product(enumerate(COMPARED), seeds):
            value = 0.5 + number / 100 + seed % 2 * number / 1000
            lines.append(line(variant, seed, value, data_set=data_set, forced=0.25 if number > 1 else None))
    write_cross_layer(write(tmp_path / "r.jsonl", lines[:-3]))
    report = (tmp_path / "r.md").read_text()
    assert "**3 runs are missing.** Nothing is tested before all are done." in report
    assert "corrected" not in report
    write_cross_layer(write(tmp_path / "r.jsonl", lines))
    report = (tmp_path / "r.md").read_text()
    assert "| toy_vqa | cross_layer_bridge - bridge | +0.0105 | +0.0102 to +0.0108 | 12 |" in report
    assert "| pictures | cross_layer_bridge_even - bridge | +0.0210 | +0.0202 to +0.0218 | 10 |" in report
    assert "| toy_vqa | cross_layer_bridge_even - cross_layer_bridge | +0.0105 | +0.0102 to +0.0108 |\n" in report
    assert "| toy_vqa | cross_layer_bridge | partner | -0.2500 ± 0.0000 |" in report
    assert "for the 6 rows of the table" in report
    assert "| bridgetower | 0.4500 ± 0.0522 |" in report
    assert (tmp_path / "r_gates.png").exists()


@pytest.mark.integration
def test_a_pilot_alone_gives_numbers_of_seeds_and_no_comparison(tmp_path):
    values = [("bridge", 0, 0.5), ("bridge", 1, 0.6), ("cross_layer_bridge", 0, 0.51), ("cross_layer_bridge", 1, 0.63)]
    write_cross_layer(write(tmp_path / "r.jsonl", [line(*one, stage="pilot") for one in values]))
    report = (tmp_path / "r.md").read_text()
    assert "**88 runs are missing.**" in report
    assert "corrected" not in report
    assert "| toy_vqa | cross_layer_bridge - bridge | +0.0200 | 0.0141 | 28 | 10 |" in report


def test_runs_that_do_not_compare_are_refused(tmp_path):
    lines = [line("bridge", 1, 0.5), line("in_layer", 1, 0.5)]
    lines[1]["settings"] = dict(reversed(lines[1]["settings"].items()))
    check(lines, tmp_path)
    with pytest.raises(DataError, match="toy_vqa differ in their settings"):
        check([*lines, line("bridge", 2, 0.5) | {"settings": {"layers": 1}}], tmp_path)
    with pytest.raises(DataError, match="toy_vqa differ in their data"):
        check([*lines, line("bridge", 2, 0.5) | {"data": "other"}], tmp_path)
    with pytest.raises(DataError, match="toy_vqa bridge seed 1 is there twice"):
        check([*lines, line("bridge", 1, 0.6)], tmp_path)


def test_both_cross_layer_variants_are_compared_with_the_bridges():
    assert [one[1:] for one in comparisons([*COMPARED, PEER])] == 2 * [
        ("cross_layer_bridge", "bridge"),
        ("cross_layer_bridge", "in_layer"),
        ("cross_layer_bridge_even", "bridge"),
    ]
