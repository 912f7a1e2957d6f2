"""Metrics on disk: one record a step, also after a kill and a resume; signals are noted."""

import io
import json
import math
import resource

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from unimo3.gate_map import draw_gate_map
from unimo3.training.metrics import MetricsWriter, read_metrics


def write(folder, steps, resumed_step=0):
    writer = MetricsWriter(folder, resumed_step, enabled=True)
    for step in steps:
        writer.write({"step": step, "loss": 1.0 / step})
    writer.write({"step": steps[-1], "accuracy": 0.5}, group="eval")
    writer.close()


def test_each_step_is_recorded_once_after_a_kill_and_a_resume(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{}\n" + "[" * 100_000 + '\n{"step": null}\n{"step": 8, "lo')
    write(tmp_path, range(6, 10), resumed_step=5)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 10))
    assert [record["step"] for record in read_metrics(tmp_path, group="eval")] == [9]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_an_evaluation_alone_drops_no_records(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    writer = MetricsWriter(tmp_path, None, enabled=True)
    writer.write({"step": 5, "accuracy": 0.9}, group="eval")
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 8))
    assert [record["step"] for record in read_metrics(tmp_path, group="eval")] == [7, 5]


def test_tensorboard_shows_the_same_metrics(tmp_path):
    write(tmp_path, range(1, 5))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/accuracy"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 5)
    ]


def test_all_numbers_of_a_step_are_one_event_of_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, 0, enabled=True)
    writer.write({"step": 1, "loss": 2.0, "lr": 1e-3, "bad_samples": 0, "loss_itc": None})
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]
    assert [[value.tag for value in event.summary.value] for event in events] == [
        ["train/loss", "train/lr", "train/bad_samples"]
    ]


@pytest.mark.parametrize("by_head", [False, True])
def test_gates_are_recorded_and_shown_as_a_gate_map(tmp_path, by_head):
    gates = [[[0.25, 0.75, 0.0], [0.75, 0.25, 0.0]], [[0.5, 0.25, 0.25], [0.0, 0.75, 0.25]]]
    writer = MetricsWriter(tmp_path, 0, enabled=True, gate_heads=by_head)
    writer.write({"step": 3, "data": "abc", "gates_text": gates}, group="eval")
    writer.close()
    assert read_metrics(tmp_path, group="eval") == [{"group": "eval", "step": 3, "data": "abc", "gates_text": gates}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Images("eval/gates_text")
    shown = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    assert shown == draw_gate_map(gates, 0, "gates_text at step 3", by_head).convert("RGB")


def test_gates_that_are_not_finite_are_shown_and_end_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, 0, enabled=True)
    writer.write({"step": 1, "loss": None, "gates_text": [[[math.nan, math.inf]]]})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Images("train/gates_text")) == 1


def test_a_run_has_a_bounded_number_of_gate_maps(tmp_path):
    writer = MetricsWriter(tmp_path, 0, enabled=True, map_every=10)
    for step in range(1, 31):
        for group in ("train", "eval"):
            writer.write({"step": step, "gates_text": [[[0.5, 0.5]]]}, group)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("train/gates_text")] == [1, 11, 21]
    assert [event.step for event in events.Images("eval/gates_text")] == list(range(1, 31))
    assert len(read_metrics(tmp_path)) == 30


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_full_disk_delays_metrics_and_does_not_end_the_run(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0, enabled=True)
    writer.write({"step": 1, "loss": 2.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, hard))
    try:
        writer.write({"step": 2, "loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "metrics of step 2 cannot be written yet (" in caplog.text
    writer.write({"step": 3, "loss": 2.0})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, 0, enabled=False)
    writer.write({"step": 1})
    writer.close()
    assert list(tmp_path.iterdir()) == []
