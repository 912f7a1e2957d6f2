"""A run's folder: its settings, what counts as too many bad samples, and checkpoints of which none is good."""

import json
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.train import PretrainConfig
from unimo3 import config
from unimo3.checkpoint import store
from unimo3.checkpoint.state import TrainState
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import train_tokenizer
from unimo3.errors import CheckpointError, ConfigError, DataError
from unimo3.training.metrics import MetricsWriter
from unimo3.training.optim import OptimArgs
from unimo3.training.run import Run, RunArgs, changed_settings


@pytest.fixture
def settings(tmp_path):
    return PretrainConfig(run=RunArgs(name="run", dir=str(tmp_path)), data=DataArgs(train="shards", max_bad_ratio=0.1))


def start(settings):
    return Run(settings, global_batch=10, fingerprint="f")


def test_the_settings_of_the_first_start_stay(settings):
    start(settings)
    later = replace(settings, checkpoint=replace(settings.checkpoint, keep_last=7))
    assert changed_settings(later) == []
    start(later)
    assert config.read_flat(settings.run.folder / "config.yaml", type(settings)) == config.flatten(settings)


def test_a_changed_setting_is_named_with_both_values(settings):
    start(settings)
    (problem,) = changed_settings(replace(settings, optim=OptimArgs(lr=3e-4)))
    assert problem.startswith("optim.lr: 0.0003: this run was started with 1e-05; keep that, or choose a new run.name")


@pytest.mark.parametrize("path", ["", "run", "run/checkpoints", "run/model"])
@pytest.mark.parametrize("target", ["missing", "file"])
def test_an_invalid_run_folder_is_refused_and_untouched(tmp_path, path, target):
    (tmp_path / "file").write_text("")
    link = tmp_path / "runs" / path
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / target)
    (error,) = RunArgs(name="run", dir=str(tmp_path / "runs")).validate()
    kind = f"a link to {tmp_path}/missing, which is missing" if target == "missing" else "a file"
    assert error == f"run.dir: '{link}': is {kind}, no folder; mount it, remove it, or choose another run.dir"
    link.unlink()
    link.mkdir()
    assert RunArgs(name="run", dir=str(tmp_path / "runs")).validate() == []


def test_a_disk_that_is_full_for_the_ledger_ends_no_run(settings, caplog):
    run = start(settings)
    run.metrics = MetricsWriter(run.folder, 0, enabled=False)
    run._ledger = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
    run.record_samples([{"samples": [("s", "0.tar", 0, "a")]}])
    assert "the ledger of step 0 cannot be written yet (" in caplog.text
    run.close()


def test_a_ledger_of_an_earlier_version_is_continued(settings):
    run = start(replace(settings, data=replace(settings.data, ledger=True)))
    path = run.folder / "ledger" / "rank_00000.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "keys": ["a"]}\n{"step": 2, "keys": ["b"]}\n{"step": 3, "keys": ["c"]}\n{"step"')
    run.step = 2
    run.resume(SimpleNamespace())
    run.step = 3
    run.record_samples([{"samples": [("coco", "0.tar", 7, "c")]}, {"samples": [("coco", "1.tar", 7, "c")]}])
    run.close()
    assert list(map(json.loads, path.read_text().splitlines())) == [
        {"step": 1, "keys": ["a"]},
        {"step": 2, "keys": ["b"]},
        {"step": 3, "samples": [["coco", "0.tar", 7, "c"], ["coco", "1.tar", 7, "c"]]},
    ]


def test_a_start_on_a_full_disk_names_the_file(settings):
    path = settings.run.folder / "config.yaml"
    path.parent.mkdir()
    path.with_name("config.yaml.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        start(settings)


def moved(settings, tokenizer):
    data = replace(settings.data, tokenizer=str(tokenizer))
    text = replace(settings.model.text, init="elsewhere/roberta-base")
    return replace(settings, data=data, model=replace(settings.model, text=text))


def test_a_moved_run_may_change_paths_of_tokenizer_and_initial_weights(settings, tmp_path):
    run = start(settings)
    for name in ("tokenizer", "other"):
        train_tokenizer([f"a red {name} on a blue square"], 300, tmp_path / name)
    shutil.copytree(tmp_path / "tokenizer", run.folder / "model")
    assert [problem.split(":")[0] for problem in changed_settings(moved(settings, tmp_path / "tokenizer"))] == [
        "model.text.init"  # no checkpoint: it would start from them
    ]
    checkpoint = store.folder_of(run.folder) / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / store.MANIFEST).write_text("{}")
    assert changed_settings(moved(settings, tmp_path / "tokenizer")) == []
    assert [problem.split(":")[0] for problem in changed_settings(moved(settings, tmp_path / "other"))] == [
        "data.tokenizer"
    ]


# Written by a version that had optim.warmup_share and data.max_bad_share.
OLD_RUN = Path(__file__).parent / "old_run"


def old_settings(folder: Path) -> PretrainConfig:
    """The settings of the old run, under today's names, for a run in `folder`."""

    def filled(group, prefix=""):
        values = {name.name: getattr(group, name.name) for name in fields(group)}
        changes = {
            name: filled(value, f"{prefix}{name}.") if is_dataclass(value) else old.get(prefix + name, value)
            for name, value in values.items()
        }
        return replace(group, **changes)

    old = config.read_flat(OLD_RUN / "config.yaml", PretrainConfig)
    settings = filled(PretrainConfig())
    assert (settings.optim.warmup_ratio, settings.data.max_bad_ratio) == (0.3, 0.001)
    data = replace(settings.data, reduced_decode=False)
    return replace(settings, run=replace(settings.run, dir=str(folder)), data=data)


def test_a_run_folder_of_an_older_version_resumes(tmp_path):
    settings = old_settings(tmp_path)
    settings.run.folder.mkdir()
    shutil.copy(OLD_RUN / "config.yaml", settings.run.folder)
    assert changed_settings(settings) == []
    (problem,) = changed_settings(replace(settings, optim=replace(settings.optim, warmup_ratio=0.2)))
    assert problem.startswith("optim.warmup_ratio: 0.2: this run was started with 0.3; keep that")
    # Its large photos were decoded in full.
    (problem,) = changed_settings(replace(settings, data=replace(settings.data, reduced_decode=True)))
    assert problem.startswith("data.reduced_decode: True: this run was started with False; keep that")


def test_a_checkpoint_of_an_older_version_resumes(tmp_path, monkeypatch):
    settings, state = old_settings(tmp_path), TrainState.read(OLD_RUN / "state.json")
    # Loading is tested elsewhere; this is what its state leads to.
    monkeypatch.setattr("unimo3.training.run.choose", lambda folder: (folder / "checkpoints" / "step_00000003", []))
    monkeypatch.setattr("unimo3.training.run.load", lambda engine, folder: state)
    run = Run(settings, state.global_batch, state.index_fingerprint)
    run.resume(engine=None)
    assert run.step == 3
    changed = replace(settings, optim=replace(settings.optim, warmup_ratio=0.2))
    run = Run(replace(changed, run=replace(changed.run, name="other")), state.global_batch, state.index_fingerprint)
    with pytest.raises(ConfigError, match=r"optim\.warmup_ratio: 0\.2: this run was started with 0\.3"):
        run.resume(engine=None)


SOURCES = [{"dataset": "a", "split": "train", "samples": 9, "weight": 1.0, "fingerprint": "a" * 64}]


def test_other_sources_are_refused_in_a_run_and_recorded_in_a_second_stage(tmp_path, monkeypatch, caplog):
    settings, state = old_settings(tmp_path), TrainState.read(OLD_RUN / "state.json")
    caplog.set_level("INFO")
    for before, data, log in (
        (SOURCES, SOURCES, "the data sources of this run are those of its weights"),
        ([], SOURCES, "the data sources of this run are new: its weights record none"),
        (
            SOURCES,
            [SOURCES[0] | {"split": "val", "fingerprint": "b" * 64}],
            "are not those of its weights: a/val added (1 of",
        ),
    ):
        run = Run(settings, state.global_batch, "f", data, before)
        run.resume(engine=None)
        assert log in caplog.text
        assert (run.state().extra["data"], run.state().extra["init_data"]) == (data, before)
    monkeypatch.setattr("unimo3.training.run.choose", lambda folder: (folder / "checkpoints" / "step_00000003", []))
    saved = replace(state, extra=state.extra | {"init_data": SOURCES})
    monkeypatch.setattr("unimo3.training.run.load", lambda engine, folder: saved)
    run = Run(settings, state.global_batch, state.index_fingerprint)
    run.resume(engine=None)
    assert run.state().extra["init_data"] == SOURCES
    run = Run(settings, state.global_batch, "other shards")
    with pytest.raises(
        CheckpointError, match=r"was trained on shards with fingerprint .* data\.train now has other shard"
    ):
        run.resume(engine=None)


@pytest.mark.parametrize(
    ("before", "now", "is_refused"),
    [
        ([], [[3, 5]], False),  # three steps are done
        ([], [[2, 5]], True),
        ([[1, 2]], [], True),
        ([[1, 2]], [[1, 2], [4, 9]], False),
        ([[1, 2]], [[1, 3]], True),
        ([[1, 2], [4, 9]], [[1, 2]], False),  # the second was not reached
        ([[7, 8]], [], False),
    ],
)
def test_only_data_that_was_not_read_can_be_skipped(tmp_path, monkeypatch, caplog, before, now, is_refused):
    settings, state = old_settings(tmp_path), TrainState.read(OLD_RUN / "state.json")
    assert state.step == 3
    state = replace(state, extra=state.extra | {"settings": state.extra["settings"] | {"data.skip": before}})
    monkeypatch.setattr("unimo3.training.run.choose", lambda folder: (folder / "checkpoints" / "step_00000003", []))
    monkeypatch.setattr("unimo3.training.run.load", lambda engine, folder: state)
    settings = replace(settings, data=replace(settings.data, skip=now))
    run = Run(settings, state.global_batch, state.index_fingerprint)
    assert changed_settings(settings) == []
    if is_refused:
        end = 4 if before else 3
        message = rf"data\.skip: .*: changes what was read up to step 3, with .*; only ranges from {end} on can change"
        with pytest.raises(ConfigError, match=message):
            run.resume(engine=None)
        return
    with caplog.at_level("INFO"):
        run.resume(engine=None)
    assert (f"data.skip: {now}: step 4 reads the data of step " in caplog.text) == bool(now)
    assert run.state().extra["settings"]["data.skip"] == now


def test_a_setting_the_file_lacks_had_its_default(settings):
    start(settings)
    path = settings.run.folder / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("  lr:")))
    assert changed_settings(settings) == []
    assert len(changed_settings(replace(settings, optim=OptimArgs(lr=3e-4)))) == 1


def test_model_files_appear_complete_and_stay_with_a_checkpoint(settings):
    run = start(settings)
    (run.folder / "model.tmp").mkdir()
    (run.folder / "model.tmp" / "left_by_a_kill").touch()

    class Broken:
        def save_pretrained(self, save_directory):
            raise OSError("disk full")

    (run.folder / "model.tmp" / "left_by_a_kill").unlink()
    with pytest.raises(OSError, match="disk full"):
        run.write_model_files(AnswerVocabulary(["no"]), Broken())
    assert not (run.folder / "model").exists()
    run.write_model_files(AnswerVocabulary(["first"]))
    run.write_model_files(AnswerVocabulary(["yes"]))
    (run.folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    run.write_model_files(AnswerVocabulary(["other"]))
    assert AnswerVocabulary.load(run.folder / "model" / "answers.json").answers == ["yes"]
    assert [path.name for path in (run.folder / "model").iterdir()] == ["answers.json"]


def test_bad_samples_above_the_ratio_end_the_run(settings):
    run = start(settings)
    run.step = 1
    run.count_bad_samples(1)
    run.step = 3
    run.count_bad_samples(2)
    assert run.num_bad_samples == 3
    with pytest.raises(
        DataError, match=r"shards: 4 of 30 samples could not be used, more than data\.max_bad_ratio 0\.1"
    ):
        run.count_bad_samples(1)


def test_a_bad_ratio_of_zero_tolerates_none(settings):
    run = start(replace(settings, data=replace(settings.data, max_bad_ratio=0)))
    run.step = 5
    run.count_bad_samples(0)
    with pytest.raises(DataError):
        run.count_bad_samples(1)


def test_a_run_whose_checkpoints_are_all_bad_does_not_start_again(settings, caplog):
    run = start(settings)
    folder = store.folder_of(run.folder) / "step_00000005"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text('{"files": []}')
    with pytest.raises(CheckpointError, match=r"none of the checkpoints is good, see the log"):
        run.resume(SimpleNamespace())
    assert "step_00000005 is damaged" in caplog.text
    assert not (run.folder / "metrics.jsonl").exists()
