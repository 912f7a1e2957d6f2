"""Stops by file and signal wherever a run is, ranks that hang, losses that are not finite.

Runs that resume have towers of families that no other file trains, and are exported.
"""

import json
import os
import threading

import pytest
import yaml
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel, XLMRobertaConfig, XLMRobertaModel

from pretrain import export as export_program
from tests.commands import start_command
from tests.integration.conftest import MODEL, losses
from tests.waiting import text_of, wait_for
from unimo3.checkpoint import store
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.heartbeat import read_heartbeats
from unimo3.training.metrics import read_metrics

pytestmark = pytest.mark.integration

SIGLIP, EVA, BEIT = (
    ("--model.vision.architecture", name)
    for name in ("vit_base_patch16_siglip_224", "eva02_base_patch14_224", "beit_base_patch16_224")
)


@pytest.fixture
def start_with_failures(program, recipe, runs, monkeypatch):
    """Starts a run of 8 steps on two ranks with failures; its status."""

    def start(name, inject, *arguments, **options):
        monkeypatch.setenv("INJECT", json.dumps(inject))
        command = ("tests.inject", "--config", recipe, "--run.name", name, "--training.steps", "8")
        return program.run(2, *command, *arguments, **options)

    return start


@pytest.fixture
def towers(tmp_path):
    """Settings of an XLM-RoBERTa and a SigLIP, from folders."""
    sizes = {name: size for name, size in MODEL["text"].items() if name != "dropout"}
    XLMRobertaModel(XLMRobertaConfig(**sizes, pad_token_id=1)).save_pretrained(tmp_path / "text")
    sizes = {name: sizes[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"intermediate_size": 128, "patch_size": 16, "image_size": 32}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "image")
    return "--model.text.init", tmp_path / "text", *SIGLIP, "--model.vision.init", tmp_path / "image"


def exported(run, out):
    """The model of a run's newest checkpoint."""
    with pytest.raises(SystemExit) as end:
        export_program.main([str(run), "--out", str(out), "--dtype", "fp32"])
    assert not end.value.code
    model, information = Unimo3ForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(information.values()), information
    return model


def when(condition, action):
    """Act once a condition is true, on a thread of its own."""

    def wait():
        wait_for(condition, "a condition of the test")
        action()

    threading.Thread(target=wait, daemon=True).start()


def phases(run):
    return {beat.rank: (beat.step, beat.phase) for beat in read_heartbeats(run)}


def test_a_stop_file_ends_a_waiting_run_and_keeps_it_stopped(start_with_failures, program, runs, towers, tmp_path):
    run = runs / "stopped"
    when(lambda: phases(run) == {0: (3, "wait"), 1: (3, "data")}, (run / "stop").touch)
    assert start_with_failures("stopped", {"no_data": [3, 1]}, *towers) == 0
    assert f"stopped by the file {run / 'stop'}; step 3 of 8 is saved" in program.output
    assert store.list_checkpoints(run)[-1].name == "step_00000003"
    assert phases(run) == {0: (3, "ended"), 1: (3, "ended")}
    assert start_with_failures("stopped", {}, *towers) == 0
    assert len(read_metrics(run)) == 3
    (run / "stop").unlink()
    # Asked to be requeued: the file is taken away, so that the next start continues.
    when(lambda: len(read_metrics(run)) >= 5, (run / "requeue").touch)
    assert start_with_failures("stopped", {"until_stop": [5]}, *towers) == 75
    assert "asked to stop (the file" in program.output
    assert not (run / "requeue").exists()
    assert start_with_failures("stopped", {}, *towers) == 0
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 9))
    model = exported(run, tmp_path / "out").unimo3
    assert model.config.text_config.model_type == "xlm-roberta"
    assert not model.vision_tower.has_class_token


def test_a_signal_stops_an_evaluation_which_is_repeated_at_the_restart(start_with_failures, recipe, runs, tmp_path):
    run = runs / "cut"

    def is_evaluating():
        return phases(run).get(0) == (4, "evaluate")

    val = yaml.safe_load(recipe.read_text())["data"]["train"]  # two batches and no shared images
    options = ("--data.val", val, *EVA)
    assert start_with_failures("cut", {"eval_until_stop": True}, *options, stop_when=is_evaluating) == 75
    assert store.list_checkpoints(run)[-1].name == "step_00000004"
    assert read_metrics(run, group="eval") == []
    assert start_with_failures("cut", {}, *options) == 0
    assert [record["step"] for record in read_metrics(run, group="eval")] == [4, 8]
    assert type(exported(run, tmp_path / "out").unimo3.vision_tower.vit).__name__ == "Eva"


def test_a_run_has_one_user_and_does_not_outlive_its_launcher(recipe, runs, program, tmp_path):
    run, command = runs / "orphaned", ("tests.inject", "--config", recipe, "--run.name", "orphaned", *BEIT)
    environment = os.environ | {"INJECT": '{"until_stop": [4]}'}
    launcher = start_command("unimo3.launch", ("-n", "2", *command), environment, tmp_path / "log")
    wait_for(lambda: len(read_metrics(run)) == 4, "4 steps", text_of(tmp_path / "log"))
    ranks = read_heartbeats(run)
    assert program.run(2, *command) == 78
    assert f"pid {ranks[0].pid} on {ranks[0].host} uses this run" in program.output
    assert program.run(1, "pretrain.train", *command[1:]) == 78
    assert [beat.pid for beat in read_heartbeats(run)] == [beat.pid for beat in ranks]
    launcher.kill()
    wait_for(lambda: not any(beat.is_alive() for beat in ranks), "the end of the ranks", text_of(tmp_path / "log"))
    assert store.list_checkpoints(run)[-1].name == "step_00000005"  # they have saved
    program.check(2, *command, "--training.stop_after", "6")
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 7))
    assert type(exported(run, tmp_path / "out").unimo3.vision_tower.vit).__name__ == "Beit"


def test_a_frozen_rank_is_named_and_the_others_write_their_stacks(start_with_failures, program, runs):
    run = runs / "frozen"
    assert start_with_failures("frozen", {"freeze": [3, 1]}, "--training.stall_after_s", "30") == 71
    assert "no progress for 30 s (training.stall_after_s); the others wait for rank 1 on " in program.output
    assert "its process is T (stopped)" in program.output
    assert "trainer.py" in (run / "stacks" / "rank_00000.txt").read_text()
    assert "inject.py" in (run / "stacks" / "asked_00001.txt").read_text()  # the stopped rank was woken for it alone


def test_a_rank_without_data_is_named_by_its_phase(start_with_failures, program, runs):
    assert start_with_failures("starved", {"no_data": [2, 0]}, "--training.stall_after_s", "30") == 71
    assert "the others wait for rank 0 on " in program.output
    assert "in phase 'data' of step 2" in program.output
    assert all((runs / "starved" / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1))


def test_steps_whose_loss_is_not_finite_are_skipped_and_counted(start_with_failures, program, runs, tmp_path):
    run = runs / "skipped"
    assert start_with_failures("skipped", {"nan": [[3, 1], [4, 1]]}, "--training.max_skipped", "2") == 0
    assert "step 4: the loss or its gradient is not finite" in program.output
    records = read_metrics(run)
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [record["loss"] is None for record in records] == [False] * 3 + [True] * 2 + [False] * 3
    program.check(0, "pretrain.export", run, "--out", tmp_path / "out", "--dtype", "fp32")
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_too_many_skipped_steps_in_a_row_end_the_run_with_status_70(start_with_failures, program, runs):
    nan = [[step, 0] for step in range(2, 8)]
    assert start_with_failures("diverged", {"nan": nan}, "--training.max_skipped", "2") == 70
    assert "DivergedError: step 5: the loss or its gradient is not finite" in program.output
    assert "3 steps in a row" in program.output
    assert [loss["loss"] for loss in losses(runs / "diverged")][2:] == [None] * 3
