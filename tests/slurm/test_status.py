"""What the state of a run is output from, without a Slurm."""

import json
import math
import os
import time
from dataclasses import asdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slurm import bad_nodes, history, prometheus, squeue, status
from tests.waiting import PATIENCE_S
from unimo3.training.heartbeat import Heartbeat


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "bad_nodes.jsonl"))
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("training: {steps: 1000}\n")
    return folder


def state_of(run):
    return status.state_of(run, squeue.read_queue())


def write_steps(run, *speeds):
    with (run / "metrics.jsonl").open("w") as file:
        for step, speed in enumerate(speeds, 1):
            record = {"step": step, "loss": 1.0 / step, "pairs_per_s": speed, "step_s": 8 / speed, "skipped_steps": 1}
            file.write(json.dumps(record) + "\n")
        file.write('{"group": "eval", "step": 40, "loss": 9.0}\n{"step": 41, "lo')  # cut off by a kill


def test_a_run_that_has_not_begun_is_shown_as_such(run):
    assert [line.split()[0] for line in status.screen(state_of(run)).splitlines()[1:]] == [
        "job",
        "step",
        "checkpoint",
        "starts",
    ]
    assert state_of(run)["left_s"] is None


def test_step_speed_trend_and_end_come_from_the_metrics(run):
    write_steps(run, *[8.0] * 20, *[4.0] * 20)
    state = state_of(run)
    assert (state["step"], state["steps"], state["loss"]) == (40, 1000, pytest.approx(1 / 40))
    assert state["pairs_per_s"] == 4.0
    assert state["trend"] == pytest.approx(-0.5)
    assert state["left_s"] == pytest.approx(960 * 2.0)
    screen = status.screen(state)
    assert "40 of 1000 (4.0 %)" in screen
    assert "-50 % against the 20 before" in screen
    assert "in 32.0 min" in screen


def test_skipped_data_is_that_of_the_newest_checkpoint(run):
    assert not any("data.skip" in line for line in status.screen(state_of(run)).splitlines())
    (run / "config.yaml").write_text("training: {steps: 1000}\ndata: {skip: [[3, 5]]}\n")
    assert state_of(run)["skip"] == [[3, 5]]
    checkpoint = run / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").touch()
    (checkpoint / "state.json").write_text('{"extra": {"settings": {"data.skip": [[3, 5], [8, 18]]}}}')
    (run / "metrics.jsonl").write_text(
        '{"step": 11, "loss": 1.0, "pairs_per_s": 2.0, "step_s": 4.0, "data_step": 23}\n'
    )
    state = state_of(run)
    assert (state["skip"], state["data_step"]) == ([[3, 5], [8, 18]], 23)
    assert "  data.skip   [[3, 5], [8, 18]]; step 11 read the data of step 23\n" in status.screen(state)


def test_starts_checkpoints_ranks_and_bad_nodes_are_shown(run, tmp_path):
    history.append(run, "begin", job="7", restart=0, nodes="n[1-2]", checkpoint=None)
    history.append(run, "end", job="7", status=137, action="requeue", reason="status 137: ...", checkpoint=10)
    begin = {"event": "begin", "time": time.time() - 1000, "job": "7", "restart": 1, "nodes": "n1", "checkpoint": 10}
    with (run / "slurm" / "history.jsonl").open("a") as file:
        file.write(json.dumps(begin) + "\n")
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run / "checkpoints" / "step_00000010" / "MANIFEST.json").write_text('{"files": []}')
    (run / "heartbeats").mkdir()
    now = time.time()
    before = ("compute", now - 2000)  # of a start with more ranks
    for rank, (phase, seen) in enumerate((("compute", now), ("compute", now - 300), ("ended", now - 900), before)):
        skewed = seen + 500 * rank  # by their nodes' clocks
        beat = Heartbeat(rank, f"n{rank}", 100 + rank, 10, phase, 50, skewed, skewed)
        path = run / "heartbeats" / f"rank_0000{rank}.json"
        path.write_text(json.dumps(asdict(beat)))
        os.utime(path, (seen, seen))
    (tmp_path / "bad_nodes.jsonl").write_text(
        json.dumps({"node": "n9", "reason": "no GPU", "job": "7", "until": now + 9}) + "\n"
    )
    state = state_of(run)
    silent = "there is no squeue on this machine to ask"
    assert state["jobs"] == [{"id": "7", "state": "UNKNOWN", "reason": silent, "nodes": "", "comment": ""}]
    assert state["checkpoint"]["step"] == 10
    assert (state["starts"], [restart["action"] for restart in state["restarts"]]) == (2, ["requeue"])
    assert [silent["rank"] for silent in state["ranks"]["silent"]] == [1]
    screen = status.screen(state)
    for text in (
        "requeue: status 137",
        "3: 2 in compute, 1 in ended",
        "rank 1 on n1 is silent for 5.0 min",
        "n9: no GPU",
    ):
        assert text in screen


@pytest.mark.integration
def test_a_stop_file_is_shown_and_a_held_job_has_its_reason(run, fake_squeue):
    history.append(run, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    (run / "stop").touch()
    for comment, line in (("held: a setting", "  held for    a setting"), ("mine", "  comment     mine")):
        fake_squeue(f"case $* in *=7*) echo 'SPECIAL_EXIT|JobHeldUser||{comment}';; esac")
        output = status.screen(state_of(run))
        assert line in output
        assert "/stop exists: every start saves and exits immediately" in output
        assert "ends  " not in output


@pytest.fixture
def fake_squeue(tmp_path, monkeypatch):
    """Has a program in place of squeue that prints what a test wants; for answers a Slurm gives only when it is ill."""

    def answers(script):
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    return answers


@pytest.mark.integration
def test_a_start_that_was_cut_off_is_among_the_restarts(run, fake_squeue):
    history.append(run, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    history.append(run, "begin", job="7", restart=1, nodes="n1", checkpoint=4)
    history.append(run, "end", job="7", status=75, action="requeue", reason="asked to stop", checkpoint=8)
    history.append(run, "begin", job="7", restart=2, nodes="n1", checkpoint=8)
    actions = [restart["action"] for restart in state_of(run)["restarts"]]
    assert actions == ["cut off", "requeue"]  # the last one may be at work
    fake_squeue("case $* in *7*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;; esac")
    state = state_of(run)
    assert [job["state"] for job in state["jobs"]] == ["ENDED"]
    assert [restart["action"] for restart in state["restarts"]] == ["cut off", "requeue", "cut off"]
    assert "cut off: after this start" in status.screen(state)


@pytest.mark.integration
def test_a_slurm_that_does_not_answer_is_reported(run, fake_squeue, capsys):
    history.append(run, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    fake_squeue("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "7 UNKNOWN, Slurm does not answer (slurm_load_jobs error: Unable" in status.screen(state_of(run))
    refused(run.parent / "none", capsys, "no such folder, and Slurm does not answer (slurm_load_jobs error: Unable")


@pytest.mark.integration
def test_prometheus_reads_the_values_of_runs_that_have_some(run, tmp_path, fake_squeue, capsys):
    write_steps(run, *[8.0] * 20, *[4.0] * 19)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 42, "loss": null, "pairs_per_s": 2.0, "step_s": 4.0}\n')
    history.append(run, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    history.append(run, "begin", job="7", restart=1, nodes="n1", checkpoint=10)
    history.append(run, "begin", job="7", restart=2, nodes="n1", checkpoint=10)
    manifest = run / "checkpoints" / "step_00000010" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    os.utime(manifest, (time.time() - 900, time.time() - 900))
    bad_nodes.add(run, "n9", "no GPU", "7")
    new = tmp_path / 'new "run"'
    new.mkdir()
    (new / "config.yaml").touch()
    fake_squeue("case $* in *=7*) echo 'SPECIAL_EXIT|JobHeldUser||held: a setting';; esac")
    path = tmp_path / "unimo3.prom"
    path.write_text("of an earlier call")
    with pytest.raises(SystemExit) as ended:
        status.main([str(run), str(new), "--prometheus", str(path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.glob("*prom*")) == [path]

    families = {family.name: family for family in text_string_to_metric_families(path.read_text())}
    assert families["unimo3_restarts"].type == "counter"
    values = {name: {s.labels.get("run"): s.value for s in family.samples} for name, family in families.items()}
    age_s, loss = values["unimo3_checkpoint_age_seconds"].pop(str(run)), values["unimo3_loss"].pop(str(run))
    assert 900 <= age_s < 900 + PATIENCE_S
    assert math.isnan(loss)
    assert values == {
        "unimo3_step": {str(run): 42},
        "unimo3_loss": {},
        "unimo3_pairs_per_second": {str(run): 4.0},  # of the last 20 steps, 19 at 4 and one at 2
        "unimo3_checkpoint_age_seconds": {},
        "unimo3_held": {str(run): 1, str(new): 0},
        "unimo3_restarts": {str(run): 2, str(new): 0},
        "unimo3_bad_nodes": {None: 1},
    }
    fake_squeue("exit 1")  # what Slurm knows is not known then
    refused(run, capsys, f"--prometheus {tmp_path}/none/x: cannot be written", "--prometheus", tmp_path / "none" / "x")
    assert "unimo3_held{" not in prometheus.text_of([state_of(run)], 0)


def refused(folder, capsys, text, *options):
    with pytest.raises(SystemExit) as ended:
        status.main([str(folder), *map(str, options)])
    assert ended.value.code == 78
    assert text in capsys.readouterr().err


@pytest.mark.integration
def test_a_missing_folder_is_refused(tmp_path, fake_squeue, capsys):
    fake_squeue("exit 0")
    refused(tmp_path / "none", capsys, "no such folder, and no job is queued for it; name the folder of a run")
