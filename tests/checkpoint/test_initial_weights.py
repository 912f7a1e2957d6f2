"""What a new run starts from."""

import shutil

import pytest
from safetensors.torch import load_file

from unimo3.checkpoint.initial_weights import exports, model_files_of, weights_of
from unimo3.errors import CheckpointError


def test_an_exported_folder_is_used_unchanged(tmp_path):
    assert weights_of(str(tmp_path / "exported"), tmp_path / "new") == str(tmp_path / "exported")
    assert model_files_of(str(tmp_path / "exported"), tmp_path / "new") == str(tmp_path / "exported")


def test_a_run_and_its_checkpoints_are_exported_once_for_each_source(run_copy, tmp_path):
    run, new = run_copy("fp32"), tmp_path / "new"
    assert model_files_of(str(run), new) == str(run / "model")
    newest = load_file(f"{weights_of(str(run), new)}/model.safetensors")
    earlier_source = run / "checkpoints" / "step_00000002"
    earlier = load_file(f"{weights_of(str(earlier_source), new)}/model.safetensors")
    assert not newest["embed.weight"].equal(earlier["embed.weight"])
    # Retention may remove the source: a later start resumes from its export.
    shutil.rmtree(earlier_source)
    assert weights_of(str(earlier_source), new) == model_files_of(str(earlier_source), new) == str(new / "init")
    # Half an export is invalid.
    (new / "init" / "source.txt").unlink()
    assert load_file(f"{weights_of(str(run), new)}/model.safetensors")["embed.weight"].equal(newest["embed.weight"])


def test_the_newest_checkpoint_is_exported_when_the_run_has_continued(run_copy, tmp_path):
    run, new = run_copy("fp32"), tmp_path / "new"
    newest = run / "checkpoints" / "step_00000004"
    newest.rename(run / "later")
    assert exports(str(run), new)
    before = load_file(f"{weights_of(str(run), new)}/model.safetensors")
    (run / "later").rename(newest)
    assert not exports(str(run), new)
    # A start before the first save begins from the same weights again.
    assert load_file(f"{weights_of(str(run), new)}/model.safetensors")["embed.weight"].equal(before["embed.weight"])
    after = load_file(f"{weights_of(str(run), new, newest=True)}/model.safetensors")
    assert not after["embed.weight"].equal(before["embed.weight"])
    made = (new / "init" / "model.safetensors").stat().st_mtime_ns
    weights_of(str(run), new, newest=True)
    assert (new / "init" / "model.safetensors").stat().st_mtime_ns == made
    shutil.rmtree(run)
    assert weights_of(str(run), new, newest=True) == str(new / "init")


def test_a_run_that_has_begun_no_longer_needs_its_first_weights(run_copy, tmp_path):
    new = run_copy("fp32")
    assert model_files_of(str(tmp_path / "gone"), new) == str(new / "model")
    assert not exports(str(run_copy("bf16")), new)
    shutil.rmtree(new / "checkpoints")
    assert model_files_of(str(tmp_path / "gone"), new) == str(tmp_path / "gone")


def test_a_damaged_checkpoint_is_named(run_copy, tmp_path):
    folder = run_copy("fp32") / "checkpoints" / "step_00000002"
    next(folder.glob("*optim_states.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"init: '.*step_00000002': is damaged"):
        weights_of(str(folder), tmp_path / "new")
