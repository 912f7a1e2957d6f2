"""pretrain.log_to: real clients of MLflow and W&B get every record once, under one run, whatever happens between."""

import functools
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from wandb.proto import wandb_internal_pb2

from pretrain import log_to
from tests.waiting import wait_for
from unimo3.training.metrics import MetricsWriter

GATES = [[[0.25, 0.75, 0.0], [0.75, 0.25, 0.0]], [[0.5, 0.25, 0.25], [0.0, 0.75, 0.25]]]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.yaml").write_text("version: 1\nrun: {seed: 3}\noptim: {lr: 0.001}\n")
    return folder


def train(run: Path, steps, resumed_step=0) -> None:
    writer = MetricsWriter(run, resumed_step, enabled=True)
    for step in steps:
        gates = {"gates_text": GATES} if step % 5 == 0 else {}
        writer.write({"step": step, "loss": None if step == 2 else 1 / step, "bad_samples": 0} | gates)
        if step % 5 == 0:
            writer.write({"step": step, "save_s": 0.5}, group="save")
            writer.write({"step": step, "data": "abc", "accuracy": step / 10}, group="eval")
    writer.close()


def log(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        log_to.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def of_mlflow(run: Path):
    """The client, and the id of the only run."""
    client = MlflowClient()
    (runs,) = client.search_runs([client.get_experiment_by_name("unimo3").experiment_id])
    return client, runs.info.run_id


def history(run: Path, name: str) -> list[tuple[int, float]]:
    client, run_id = of_mlflow(run)
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def test_mlflow_has_every_record_once_after_a_resume(run):
    train(run, range(1, 8))
    assert log("mlflow", run) == 0
    train(run, range(6, 13), resumed_step=5)  # a requeue: steps 6 and 7 are computed again
    assert log("mlflow", run) == 0
    assert log("mlflow", run) == 0
    assert history(run, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 13) if step != 2]
    assert history(run, "eval/accuracy") == [(5, 0.5), (10, 1.0)]
    assert history(run, "save/save_s") == [(5, 0.5), (10, 0.5)]
    assert history(run, "train/gates_text/layer_3_level_2") == [(5, 0.25), (10, 0.25)]
    client, run_id = of_mlflow(run)
    assert client.get_run(run_id).data.params == {"run.seed": "3", "optim.lr": "0.001"}
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).info.run_name == "base"


def test_an_evaluation_of_an_older_checkpoint_is_sent(run):
    train(run, range(1, 11))
    log("mlflow", run)
    writer = MetricsWriter(run, None, enabled=True)
    writer.write({"step": 5, "data": "other", "accuracy": 0.9}, group="eval")
    writer.close()
    log("mlflow", run)
    assert history(run, "eval/accuracy") == [(5, 0.5), (5, 0.9), (10, 1.0)]


def test_what_a_broken_connection_left_is_sent_by_the_next_call(run, capsys, monkeypatch):
    train(run, range(1, 8))
    log("mlflow", run)
    train(run, range(8, 11), resumed_step=7)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert log("mlflow", run) == 1
    assert "check MLFLOW_TRACKING_URI, the login and the server" in capsys.readouterr().err
    assert log("mlflow", run) == 0
    assert [step for step, _ in history(run, "train/loss")] == [1, *range(3, 11)]


def messages(content: bytes) -> Iterator[bytes]:
    """Of a .wandb file: a log of LevelDB, https://github.com/google/leveldb/blob/main/doc/log_format.md."""
    position, message = 7, b""  # after the file's header
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block
            position += 32768 - position % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        message += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # complete, or the last part
            yield message
            message = b""


def runs_of_wandb(folder: Path):
    """(run id, history rows) of every offline run's file, oldest first."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        # wandb's own process still writes when the client has ended.
        records = wait_for(functools.partial(complete_records, path), f"the end of {path}")
        run_id = next(record.run.run_id for record in records if record.WhichOneof("record_type") == "run")
        rows = [
            {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        runs.append((run_id, rows))
    return runs


def complete_records(path: Path) -> list[wandb_internal_pb2.Record]:
    """All records of a file; none before its last one is there."""
    records = [wandb_internal_pb2.Record.FromString(message) for message in messages(path.read_bytes())]
    return records if records and records[-1].WhichOneof("record_type") == "exit" else []


@pytest.mark.integration
def test_wandb_has_every_record_once_under_one_id(run):
    train(run, range(1, 8))
    assert log("wandb", run) == 0
    train(run, range(6, 13), resumed_step=5)
    assert log("wandb", run) == 0
    first, second = runs_of_wandb(run.parent)
    assert first[0] == second[0] == json.loads((run / "log_to_wandb.json").read_text())["run_id"]
    rows = first[1] + second[1]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 13) if step != 2]
    assert [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row] == [(5, 0.5), (10, 1.0)]


def test_a_run_that_is_gone_and_a_second_sender_are_named(run, tmp_path, capsys, monkeypatch):
    train(run, range(1, 3))
    log("mlflow", run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'other'}")
    assert log("mlflow", run) == 78
    error = capsys.readouterr().err
    assert "log_to_mlflow.json: its run does not exist (" in error
    assert "remove the file to send all again" in error
    with log_to.locked(run / "log_to_mlflow.lock"):
        assert log("mlflow", run) == 78
    assert "another log_to sends the metrics of this run" in capsys.readouterr().err


def test_names_that_mlflow_refuses_and_damaged_gates_cost_nothing(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step, gates in enumerate(([[0.5]], "high", [[[0.5, "x"]]], []), 1):
            file.write(json.dumps({"step": step, "loss": 1.0, "gates_text": gates, "acc (rare) \u00e8+": 0.5}) + "\n")
    assert log("mlflow", run) == 0
    assert history(run, "train/acc _rare_ __") == [(step, 0.5) for step in range(1, 5)]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 3, "last_step": 0, "others": []}', "[" * 100_000])
def test_a_damaged_note_is_named(run, capsys, content):
    train(run, range(1, 3))
    (run / "log_to_mlflow.json").write_text(content)
    assert log("mlflow", run) == 78
    assert "log_to_mlflow.json: cannot be used (" in capsys.readouterr().err


def test_bad_arguments_are_named_all_at_once(tmp_path, capsys):
    assert log("mlflow", tmp_path, "--every", "0") == 78
    errors = capsys.readouterr().err
    assert f"{tmp_path}: is no run's folder, it has no config.yaml; name the folder of a run" in errors
    assert "--every 0.0: a number of seconds above 0 is needed" in errors


def test_a_tool_that_is_not_installed_is_named_with_its_command(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert log("wandb", run) == 78
    assert "pip install wandb" in capsys.readouterr().err
