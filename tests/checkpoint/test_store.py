import errno
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoints as program
from pretrain.export import choose_checkpoint
from tests.checkpoint.conftest import SavedRuns
from tests.checkpoint.ranks import RUNS, load_runs
from tests.spawn import run_ranks
from unimo3.checkpoint import export, load, manifest, store
from unimo3.checkpoint.load import choose, newest_good, quarantine
from unimo3.checkpoint.manifest import MANIFEST, flush_and_hash, write_manifest
from unimo3.checkpoint.state import TrainState, capture_rng, load_rng, save_rng
from unimo3.errors import CHECK_MOUNT, CheckpointError, UnreachableError

OPTIM = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def truncate(folder: Path) -> None:
    content = (folder / OPTIM).read_bytes()
    (folder / OPTIM).write_bytes(content[:-100])


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / OPTIM).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / OPTIM).write_bytes(content)


def delete_a_file(folder: Path) -> None:
    (folder / MODEL).unlink()


def swap_two_ranks(folder: Path) -> None:
    other = folder / OPTIM.replace("rank_1", "rank_0")
    (folder / OPTIM).rename(folder / "swapped")
    other.rename(folder / OPTIM)
    (folder / "swapped").rename(other)


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("")


def manifest_without_files(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": []}')


def delete_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def add_an_unlisted_file(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / MODEL.replace("rank_0", "rank_2"))


def lead_out_of_the_folder(folder: Path) -> None:
    listed = json.loads((folder / MANIFEST).read_text())
    (folder.parent / "outside").write_text("")
    listed["files"] += [{**flush_and_hash(folder.parent, [folder.parent / "outside"])[0], "name": "../outside"}]
    (folder / MANIFEST).write_text(json.dumps(listed))


def name_what_cannot_be_a_file(folder: Path) -> None:
    listed = json.loads((folder / MANIFEST).read_text())
    listed["files"] += [{**listed["files"][0], "name": "half\ud800\0"}]
    (folder / MANIFEST).write_text(json.dumps(listed))


class Crafted:
    """Writes a file when it is unpickled without restriction."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def plant_a_pickle(folder: Path) -> None:
    """As somebody who may write into the folder can: with a manifest that vouches for it."""
    torch.save({"param_shapes": Crafted(folder.parent / "run by a pickle")}, folder / MODEL)
    listed = json.loads((folder / MANIFEST).read_text())
    entry = flush_and_hash(folder, [folder / MODEL])[0]
    listed["files"] = [entry if old["name"] == MODEL else old for old in listed["files"]]
    (folder / MANIFEST).write_text(json.dumps(listed))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: f"{OPTIM} has ",
    flip_a_byte: f"{OPTIM} does not match its SHA-256",
    delete_a_file: f"{MODEL} is missing",
    swap_two_ranks: f"{OPTIM} does not match its SHA-256",
    empty_manifest: f"{MANIFEST} cannot be read",
    manifest_without_files: f"{MANIFEST} does not list state.json",
    delete_manifest: f"{MANIFEST} cannot be read",
    add_an_unlisted_file: "is not listed",
    lead_out_of_the_folder: "points outside the folder",
    name_what_cannot_be_a_file: f"{MANIFEST} cannot be read (ValueError: 'half\\ud800\\x00' is no name",
    plant_a_pickle: "contains more than tensors and plain data, refused",
}


RNG = "rng_rank_1.safetensors"
SILENT = {OPTIM: "loading", RNG: "loading", store.STATE: "reading"}


def unanswered(folder: Path, name: str) -> Path:
    """A checkpoint of which reading one file ends with EIO, as of storage that gives no answer."""
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")
    return folder


@pytest.fixture(scope="module")
def loaded(saved: SavedRuns, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two fresh ranks: loaded runs, choices in damaged runs, saves that failed."""
    root = tmp_path_factory.mktemp("loaded")
    damaged = []
    for damage in DAMAGES:
        run = root / damage.__name__
        shutil.copytree(saved.root / "bf16", run)
        damage(run / "checkpoints" / "step_00000004")
        damaged.append(run)
    nothing_good = root / "nothing_good"
    shutil.copytree(damaged[0], nothing_good)
    truncate(nothing_good / "checkpoints" / "step_00000002")
    stale_latest = root / "stale_latest"
    shutil.copytree(saved.root / "bf16", stale_latest)
    (stale_latest / "checkpoints" / "latest").write_text("step_00000099")
    errors = root / "errors"
    for name in ("full", "vanished"):
        shutil.copytree(saved.root / "bf16", errors / name)
    without = shutil.copytree(saved.root / "bf16" / "checkpoints" / "step_00000004", root / "without" / "step_00000004")
    (without / "rng_rank_1.safetensors").unlink()
    runs = [*damaged, nothing_good, stale_latest, root / "no_run"]
    newest = saved.root / "bf16" / "checkpoints" / "step_00000004"
    silent = [unanswered(shutil.copytree(newest, root / name / "step_00000004"), name) for name in SILENT]
    return run_ranks(2, load_runs, saved.root, runs, errors, without, silent)


def committed_checkpoint(run: Path, step: int) -> Path:
    """A small checkpoint without tensors."""
    folder = store.folder_of(run) / store.tag_of(step)
    folder.mkdir(parents=True)
    TrainState(step, 8 * step, "config", "index", 2, 8).write(folder / store.STATE)
    write_manifest(folder, flush_and_hash(folder, [folder / store.STATE]))
    return folder


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_a_save_leaves_deepspeeds_files_state_generators_and_manifest(saved):
    folder = saved.root / "bf16" / "checkpoints" / "step_00000004"
    listed = [entry["name"] for entry in json.loads((folder / MANIFEST).read_text())["files"]]
    assert listed == sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    for rank in range(2):
        assert f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in listed
        assert f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" in listed
        assert f"rng_rank_{rank}.safetensors" in listed
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert (folder.parent / "latest").read_text() == "step_00000004"


@pytest.mark.integration
@pytest.mark.parametrize("run", RUNS)
def test_loading_restores_weights_moments_and_state_exactly(saved, loaded, run):
    for before, after in zip(saved.results, loaded, strict=True):
        assert after[run]["state"] == TrainState(
            4,
            32,
            "config",
            "index",
            2,
            8,
            {"note": "retained"},
            engine={"bf16": "ZeRO-3 bf16", "fp32": "ZeRO-3 fp32", "zero2": "ZeRO-2 bf16", "zero1": "ZeRO-1 fp32"}[run],
        )
        assert after[run]["weights"].keys() == before[run]["weights"].keys()
        for name, weight in before[run]["weights"].items():
            torch.testing.assert_close(after[run]["weights"][name], weight, rtol=0, atol=0)
        assert len(before[run]["moments"]) > 0
        for left, right in zip(before[run]["moments"], after[run]["moments"], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.integration
@pytest.mark.parametrize("run", RUNS)
def test_training_continues_as_if_never_stopped(saved, loaded, run):
    for before, after in zip(saved.results, loaded, strict=True):
        assert after[run]["losses"] == before[run]["losses"]


def test_each_rank_has_its_own_generators(saved):
    folder = saved.root / "bf16" / "checkpoints" / "step_00000004"
    draws = []
    for rank in range(2):
        load_rng(folder / f"rng_rank_{rank}.safetensors")
        draws.append(torch.rand(4))
    assert not torch.equal(*draws)


def test_generators_draw_the_same_after_loading(tmp_path):
    import random

    import numpy as np

    save_rng(tmp_path / "rng.safetensors", capture_rng())
    draw = lambda: (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: E731, NPY002
    first = draw()
    assert draw() != first
    load_rng(tmp_path / "rng.safetensors")
    assert draw() == first


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damaged_file(run_copy, damage):
    folder = run_copy("bf16") / "checkpoints" / "step_00000004"
    assert store.verify(folder) == []
    damage(folder)
    problems = store.verify(folder)
    assert any(DAMAGES[damage] in problem for problem in problems), problems
    by_part = [problem for part in range(3) for problem in store.verify(folder, part, 3)]
    assert set(by_part) == set(problems)
    assert not (folder.parent / "run by a pickle").exists()


@pytest.mark.integration
def test_all_ranks_choose_the_same_earlier_checkpoint(loaded):
    expected = ["step_00000002"] * len(DAMAGES) + [None, "step_00000004", None]
    assert [results["chosen"] for results in loaded] == [expected, expected]


def test_a_damaged_checkpoint_is_named_in_the_log_and_stays(run_copy, caplog):
    run = run_copy("fp32")
    newest = run / "checkpoints" / "step_00000004"
    delete_a_file(newest)
    with caplog.at_level(logging.WARNING):
        chosen = newest_good(run)
    assert chosen is not None
    assert chosen.name == "step_00000002"
    assert "step_00000004 is damaged" in caplog.text
    assert f"{MODEL} is missing" in caplog.text
    assert newest.is_dir()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_storage_that_does_not_answer_is_not_damage(run_copy, monkeypatch, number):
    run = run_copy("fp32")
    newest, answers = store.list_checkpoints(run)[-1], iter([False, False])
    stock = manifest.sha256_of

    def sha256_of(path: Path) -> str:
        if next(answers, True):
            return stock(path)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    monkeypatch.setattr(manifest, "_PAUSE_S", 0.0)
    assert choose(run) == (newest, [])
    answers = itertools.repeat(False)
    with pytest.raises(UnreachableError, match=f"the storage does not answer .{os.strerror(number)}"):
        choose(run)


def test_a_file_that_gives_no_answer_at_its_second_look_is_no_damage(run_copy, monkeypatch):
    run = run_copy("fp32")
    newest = store.list_checkpoints(run)[-1]
    monkeypatch.setattr(manifest, "_PAUSE_S", 0.0)
    monkeypatch.setattr(manifest, "_problem", lambda *_: "")  # its checksum was read before
    unanswered(newest, MODEL)
    with pytest.raises(UnreachableError, match=f"{MODEL}: the storage does not answer .Input/output error"):
        choose(run)


def test_a_skipped_checkpoint_is_quarantined_and_not_counted(run_copy, tmp_path, capsys):
    run = run_copy("fp32")
    checkpoints = run / "checkpoints"
    for name in ("step_00000004.damaged", "step_00000004.damaged2"):
        delete_a_file(checkpoints / "step_00000004")
        good, damaged = choose(run)
        assert good == checkpoints / "step_00000002"
        # One that is good after all stays.
        quarantine([*damaged, good])
        assert names(store.list_checkpoints(run)) == ["step_00000002"]
        assert (checkpoints / name).is_dir()
        shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000004")
    shutil.rmtree(checkpoints / "step_00000004")
    assert run_program("ls", str(run)) == 0
    assert "step_00000004.damaged2  quarantined as damaged" in capsys.readouterr().out
    assert run_program("verify", str(run)) == 0
    assert f"step_00000004.damaged  quarantined: {MODEL} is missing" in capsys.readouterr().out
    # Somebody removes the good one: the quarantined ones still show that this is no new run.
    shutil.rmtree(checkpoints / "step_00000002")
    assert store.has_folders(run)


@pytest.mark.integration
def test_a_load_that_fails_on_one_rank_fails_on_every_rank(loaded):
    """Gathering persistent parameters is collective: a rank that continued would wait forever."""
    assert loaded[0]["one rank"] == loaded[1]["one rank"]
    assert "rank 1: " in loaded[0]["one rank"]
    assert "rank 0" not in loaded[0]["one rank"]
    assert "rng_rank_1.safetensors" in loaded[0]["one rank"]


@pytest.mark.integration
def test_a_load_without_an_answer_is_no_damage_and_is_tried_again(loaded):
    assert UnreachableError.exit_status == 1  # which a job retries; with 78 it would be held
    for results in loaded:
        for (name, doing), message in zip(SILENT.items(), results["unanswered"], strict=True):
            assert message.startswith(doing), name
            assert "Input/output error" in message
            assert message.endswith(CHECK_MOUNT)
            assert "move this checkpoint away" not in message


@pytest.mark.integration
def test_a_failed_save_raises_on_every_rank_and_the_previous_one_stays(loaded):
    for results in loaded:
        errors = results["errors"]
        assert "preparing" in errors["blocked folder"]
        assert "rank 0: FileExistsError" in errors["blocked folder"]
        assert "writing" in errors["full disk on rank 1"]
        assert "rank 1" in errors["full disk on rank 1"]
        assert "rank 0" not in errors["full disk on rank 1"]
        assert "writing" in errors["vanished folder"]
        assert "memory runs out on rank 1" in errors
        assert "rank 1: MemoryError: no memory for a copy" in errors["memory runs out on rank 1"]
        assert "rank 0" not in errors["memory runs out on rank 1"]
        assert "File too large" in errors["full disk on rank 1"]
        assert errors["remains of failed saves"] == []
        assert "flushing" in errors["vanished file"]
        assert f"{MODEL}" in errors["vanished file"]
        assert names(errors["newest"]) == ["step_00000004", "step_00000004"]
    assert loaded[0]["errors"]["full disk on rank 1"] == loaded[1]["errors"]["full disk on rank 1"]


@pytest.mark.integration
def test_a_save_after_a_failed_one_succeeds_and_may_repeat_a_step(loaded):
    for results in loaded:
        errors = results["errors"]
        assert errors["none"] is None
        assert errors["newest after"].name == "step_00000009"
        again = errors["newest after the same step again"]
        assert again.name == "step_00000009"
        assert [path.name for path in again.parent.glob("*.tmp")] == []


def test_prune_keeps_the_newest_and_every_nth(tmp_path):
    for step in (10, 20, 30, 40, 50, 60):
        committed_checkpoint(tmp_path, step)
    removed = store.prune(tmp_path, keep_last=2, keep_every=20)
    assert names(removed) == ["step_00000010", "step_00000030"]
    assert names(store.list_checkpoints(tmp_path)) == [f"step_000000{step}" for step in (20, 40, 50, 60)]
    assert store.prune(tmp_path, keep_last=0, keep_every=0)[-1].name == "step_00000050"


def test_prune_never_removes_the_last_good_checkpoint(tmp_path):
    folders = [committed_checkpoint(tmp_path, step) for step in (10, 20, 30, 40)]
    for folder in folders[2:]:
        (folder / store.STATE).write_text("{}")
    assert names(store.prune(tmp_path, keep_last=2, keep_every=0)) == ["step_00000010"]
    newest = newest_good(tmp_path)
    assert newest is not None
    assert newest.name == "step_00000020"


def test_prune_keeps_the_newest_good_one_in_addition_to_good_multiples(tmp_path):
    folders = [committed_checkpoint(tmp_path, step) for step in (1000, 1200, 1400, 1600, 1700)]
    (folders[-1] / store.STATE).write_text("{}")
    assert names(store.prune(tmp_path, keep_last=1, keep_every=1000)) == ["step_00001200", "step_00001400"]
    newest = newest_good(tmp_path)
    assert newest is not None
    assert newest.name == "step_00001600"


def test_prune_removes_nothing_where_nothing_is_good(tmp_path, caplog):
    for step in (10, 20, 30):
        (committed_checkpoint(tmp_path, step) / store.STATE).write_text("{}")
    assert store.prune(tmp_path, keep_last=1, keep_every=0) == []
    assert len(store.list_checkpoints(tmp_path)) == 3
    assert "none of the checkpoints is good; none is removed" in caplog.text


def test_a_checkpoint_is_not_lost_when_saving_its_step_again_is_killed(run_copy):
    run = run_copy("bf16")
    newest = store.list_checkpoints(run)[-1]
    replaced = newest.rename(newest.with_name(newest.name + ".replaced.tmp"))  # killed between the two renames
    assert choose(run)[0] != newest  # who only reads changes nothing: the run may be between the two
    store.restore_replaced(run)
    assert choose(run) == (newest, [])
    assert not replaced.exists()
    shutil.copytree(newest, replaced)  # killed after them
    store.restore_replaced(run)
    assert choose(run) == (newest, [])
    assert replaced.exists()  # the next save removes it


def test_uncommitted_folders_are_no_checkpoints(tmp_path):
    committed_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_00000020").mkdir()
    committed_checkpoint(tmp_path, 30).rename(tmp_path / "checkpoints" / "step_00000030.tmp")
    assert names(store.list_checkpoints(tmp_path)) == ["step_00000010"]


def test_a_state_of_another_form_is_refused(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 3}')
    with pytest.raises(CheckpointError, match=r"state\.json: is not a run's state"):
        TrainState.read(tmp_path / "state.json")


def run_program(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        program.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_program_lists_verifies_and_prunes(run_copy, capsys):
    run = run_copy("fp32")
    assert run_program("ls", str(run)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step_00000002", "step_00000004"]
    assert run_program("verify", str(run)) == 0
    (run / "checkpoints" / "step_00000005").mkdir()  # its manifest is gone, with all else
    assert run_program("ls", str(run)) == 0
    assert "step_00000005  DAMAGED: has no MANIFEST.json" in capsys.readouterr().out
    assert run_program("verify", str(run)) == 78
    assert "step_00000005  DAMAGED: MANIFEST.json cannot be read" in capsys.readouterr().out
    (run / "checkpoints" / "step_00000005").rmdir()
    delete_a_file(run / "checkpoints" / "step_00000002")
    assert run_program("verify", str(run)) == 78
    assert f"step_00000002  DAMAGED: {MODEL} is missing" in capsys.readouterr().out
    assert run_program("prune", str(run)) == 78
    assert "--keep-last: not given" in capsys.readouterr().err
    (run / "config.yaml").write_text("checkpoint:\n  keep_last: 1\n  keep_every: 0\n")
    assert run_program("prune", str(run)) == 0
    assert names(store.list_checkpoints(run)) == ["step_00000004"]


def test_a_listing_without_an_answer_is_no_damage(run_copy, capsys):
    run = run_copy("fp32")
    unanswered(store.list_checkpoints(run)[-1], store.STATE)
    assert run_program("ls", str(run)) == UnreachableError.exit_status
    printed = capsys.readouterr()
    assert "DAMAGED" not in printed.out
    assert "UnreachableError: " in printed.err


def test_a_checkpoint_that_is_removed_meanwhile_is_not_damaged(run_copy, tmp_path, capsys, monkeypatch):
    run = run_copy("fp32")
    listed = store.list_folders(run)
    monkeypatch.setattr(store, "list_folders", lambda _: listed)
    moved = listed[0].rename(tmp_path / "removed")
    for command in ("ls", "verify"):
        assert run_program(command, str(run)) == 0
        assert "step_00000002  removed meanwhile\n" in capsys.readouterr().out
    moved.rename(listed[0])
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(store, "verify", lambda folder: [str(folder.rename(moved))])
        with pytest.raises(CheckpointError, match="step_00000002: was removed meanwhile"):
            choose_checkpoint(run, "step_00000002")
    moved.rename(listed[0])
    monkeypatch.setattr(export, "copy_model_files", lambda *_: listed[0].rename(moved))
    with pytest.raises(CheckpointError, match="step_00000002: was removed during the export"):
        export.export_run(run, listed[0], tmp_path / "out", "fp32", "error", 10**9)
    assert not (tmp_path / "out").exists()


def test_program_refuses_a_run_without_checkpoints(tmp_path, capsys):
    assert run_program("ls", str(tmp_path)) == 78
    assert "has no committed checkpoint" in capsys.readouterr().err
    assert run_program("ls", str(tmp_path / "none")) == 78
    assert "no such folder" in capsys.readouterr().err


def test_a_checkpoint_that_a_newer_one_replaces_meanwhile_is_not_damaged(run_copy, monkeypatch, caplog):
    run = run_copy("fp32")
    older, newer = store.list_checkpoints(run)
    newest, stock = newer.with_name("step_00000006"), manifest.verify

    def verify(folder: Path, *part: int) -> list[str]:
        if folder == newer:  # the run saves, and removes the others
            newer.rename(newest)
            shutil.rmtree(older)
        return stock(folder, *part)

    monkeypatch.setattr(load, "verify", verify)
    assert choose(run) == (newest, [])
    assert "damaged" not in caplog.text
