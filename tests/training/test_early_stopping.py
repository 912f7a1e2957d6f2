"""The best checkpoint on held-out data: noted once it is committed, spared by retention; when to end early."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest

from pretrain.export import choose_checkpoint
from pretrain.train import PretrainConfig
from unimo3.checkpoint import manifest, store
from unimo3.checkpoint.best_record import BestRecord, read_best
from unimo3.checkpoint.manifest import flush_and_hash, write_manifest
from unimo3.errors import CheckpointError, UnreachableError
from unimo3.training.early_stopping import Best, BestArgs
from unimo3.training.metrics import MetricsWriter
from unimo3.training.run import Run, RunArgs


@pytest.fixture
def run(tmp_path):
    started = Run(PretrainConfig(run=RunArgs(dir=str(tmp_path))), global_batch=1, fingerprint="train")
    started.metrics = MetricsWriter(started.folder, 0, enabled=True)
    yield started
    started.close()


def commit(run):
    """A good checkpoint of the run's step, without tensors."""
    folder = store.folder_of(run.folder) / store.tag_of(run.step)
    folder.mkdir(parents=True, exist_ok=True)
    run.state().write(folder / store.STATE)
    write_manifest(folder, flush_and_hash(folder, [folder / store.STATE]))
    return True


def evaluate(run, best, step, value, data="val"):
    run.step = step
    best.consider(run, {"accuracy": value}, lambda: commit(run))
    run.metrics.write({"step": step, "data": data, "accuracy": value}, group="eval")


def test_the_first_of_the_largest_is_the_best(run):
    best = Best(BestArgs(), "accuracy", "val", 2)
    for step, value in ((2, 0.3), (4, 0.5), (6, 0.5), (8, 0.4)):
        evaluate(run, best, step, value)
    saved = read_best(run.folder)
    assert saved == BestRecord("step_00000004", 4, "accuracy", 0.5, "val")
    assert [folder.name for folder in store.list_checkpoints(run.folder)] == ["step_00000002", "step_00000004"]


def test_a_record_of_an_earlier_version_is_read(run):
    old = {"tag": "step_00000004", "step": 4, "figure": "accuracy", "value": 0.5, "data": "val"}
    (run.folder / "best.json").write_text(json.dumps(old))
    assert read_best(run.folder) == BestRecord("step_00000004", 4, "accuracy", 0.5, "val")


def test_the_best_is_recorded_only_when_its_checkpoint_is_committed(run):
    best = Best(BestArgs(), "accuracy", "val", 2)
    evaluate(run, best, 2, 0.3)
    run.step = 4

    def fail():
        raise CheckpointError("the disk is full")

    with pytest.raises(CheckpointError):
        best.consider(run, {"accuracy": 0.9}, fail)
    best.consider(run, {"accuracy": 0.9}, lambda: False)  # a failure that checkpoint.on_save_error lets pass
    assert read_best(run.folder).step == 2


def test_retention_never_removes_the_best(run):
    best = Best(BestArgs(), "accuracy", "val", 2)
    for step, value in ((2, 0.3), (4, 0.5), (6, 0.4), (8, 0.4)):
        evaluate(run, best, step, value)
        commit(run)
    assert [folder.name for folder in store.prune(run.folder, 1, 0)] == ["step_00000002", "step_00000006"]
    assert [folder.name for folder in store.list_checkpoints(run.folder)] == ["step_00000004", "step_00000008"]


def test_a_best_checkpoint_that_was_lost_is_replaced(run):
    best = Best(BestArgs(), "accuracy", "val", 2)
    evaluate(run, best, 2, 0.9)
    (store.folder_of(run.folder) / "step_00000002").rename(run.folder / "moved")
    evaluate(run, best, 4, 0.1)
    assert read_best(run.folder).step == 4


def test_no_best_is_chosen_on_other_data_or_without_the_metric(run, caplog):
    evaluate(run, Best(BestArgs(), "accuracy", None, 2), 2, 0.3)
    Best(BestArgs(), "accuracy_overall", "val", 2).consider(run, {}, lambda: commit(run))
    assert read_best(run.folder) is None
    evaluate(run, Best(BestArgs(), "accuracy", "val", 2), 2, 0.3)
    evaluate(run, Best(BestArgs(), "accuracy", "other", 2), 4, 0.9, "other")
    assert read_best(run.folder).step == 2
    assert "step_00000002 stays the best checkpoint: it was chosen on other held-out data" in caplog.text


def test_patience_counts_evaluations_since_the_best(run):
    best = Best(BestArgs(patience=2), "accuracy", "val", 2)
    for step, value, last in ((2, 0.3, 100), (4, 0.2, 100), (6, 0.4, 100), (8, 0.4, 100), (10, 0.1, 10)):
        evaluate(run, best, step, value)
        assert best.last_step(run, 100) == last
    # A later start, on other data as well, does not train on.
    assert Best(BestArgs(patience=2), "accuracy", None, 2).last_step(run, 100) == 10
    assert Best(BestArgs(patience=3), "accuracy", "val", 2).last_step(run, 100) == 100
    assert Best(BestArgs(), "accuracy", "val", 2).last_step(run, 100) == 100


def test_patience_counts_scheduled_evaluations_once(run):
    best = Best(BestArgs(patience=2), "accuracy", "val", 4)
    # At step 5 a start ended early, at 8 the run was evaluated twice more by itself.
    for step, last in ((4, 100), (5, 100), (6, 100), (8, 100), (8, 100), (8, 100), (12, 12)):
        evaluate(run, best, step, 0.3)
        assert best.last_step(run, 100) == last


def test_export_takes_the_best_by_name(run):
    commit(run)
    with pytest.raises(CheckpointError, match=r"--tag best: .*best\.json names none"):
        choose_checkpoint(run.folder, "best")
    best = Best(BestArgs(), "accuracy", "val", 2)
    for step, value in ((2, 0.3), (4, 0.2)):
        evaluate(run, best, step, value)
    commit(run)
    assert choose_checkpoint(run.folder, "best").checkpoint.name == "step_00000002"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_record_without_an_answer_loses_no_best_checkpoint(run, monkeypatch, number):
    best = Best(BestArgs(), "accuracy", "val", 2)
    for step, value in ((2, 0.9), (4, 0.4), (6, 0.4)):
        evaluate(run, best, step, value)
        commit(run)
    answers, stock = iter([False]), Path.read_text

    def read_text(path, *arguments, **options):
        if path.name == "best.json" and not next(answers, True):
            raise OSError(number, os.strerror(number), str(path))
        return stock(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(manifest, "_PAUSE_S", 0.0)
    assert [folder.name for folder in store.prune(run.folder, 1, 0)] == ["step_00000004"]
    answers = itertools.repeat(False)
    for fails in (lambda: store.prune(run.folder, 1, 0), lambda: evaluate(run, best, 8, 0.5)):
        with pytest.raises(UnreachableError, match=r"best\.json: the storage does not answer"):
            fails()
    answers = itertools.repeat(True)
    assert read_best(run.folder).step == 2
    assert [folder.name for folder in store.list_checkpoints(run.folder)] == ["step_00000002", "step_00000006"]
