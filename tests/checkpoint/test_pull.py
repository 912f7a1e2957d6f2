"""A run is copied back from a real S3 server: verified, complete or absent, never over a newer run or one in use."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pretrain import checkpoints as program
from tests.checkpoint.copies import (
    CHECKPOINTS,
    FILES,
    RUN_URL,
    checkpoint_of,
    commit,
    contents,
    flip_byte,
    keys,
    kill,
    make_run,
    remove,
    run_program,
    stored,
    write_heartbeat_of,
)
from tests.checkpoint.kills import FileEvents
from tests.s3 import URL, Refusal, s3, s3_server  # noqa: F401  (two are fixtures)
from tests.spawn import start_process
from tests.waiting import wait_for, wait_for_end
from unimo3.checkpoint import pull, store, stored_run
from unimo3.checkpoint.best_record import BestRecord, write_best
from unimo3.checkpoint.manifest import MANIFEST
from unimo3.checkpoint.push import Pusher, Retention

THROTTLED, EXPIRED = Refusal(503, "SlowDown"), Refusal(400, "ExpiredToken")
RANGE = 4096


@pytest.fixture
def run(s3, tmp_path, capsys):  # noqa: F811
    """A run that is in the store."""
    made = make_run(tmp_path / "small", 10, 20)
    assert run_program("push", made, RUN_URL) == 0
    capsys.readouterr()
    s3.requests.clear()
    return made


@pytest.fixture
def ranges(monkeypatch):
    """Files of the runs have several ranges."""
    for module in (stored_run, pull):
        monkeypatch.setattr(module, "RANGE_BYTES", RANGE)


def without(run: Path, *steps: int) -> dict[str, bytes]:
    """What a pull of the other checkpoints gives."""
    absent = tuple(f"checkpoints/{store.tag_of(step)}/" for step in steps)
    return {name: content for name, content in contents(run).items() if not name.startswith(absent)}


def names(run: Path) -> list[str]:
    return [folder.name for folder in store.list_checkpoints(run)]


def test_the_newest_checkpoint_and_what_a_resume_reads_are_pulled(run, tmp_path, capsys):
    assert run_program("pull", RUN_URL, tmp_path / "copy") == 0
    assert contents(tmp_path / "copy") == without(run, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "small"]
    output = capsys.readouterr().out
    assert "step_00000020: 0.1 MB in 4 files received in " in output
    assert f"copy: has step_00000020 of {RUN_URL}; the training command resumes from the newest" in output
    assert store.verify(tmp_path / "copy" / "checkpoints" / "step_00000020") == []


@pytest.mark.parametrize("tag", [None, "best", "step_00000010"])
def test_the_best_checkpoint_is_pulled_too_or_alone(s3, run, tmp_path, tag):  # noqa: F811
    write_best(run, BestRecord("step_00000010", 10, "accuracy", 0.5, "data"))
    assert run_program("push", run, RUN_URL) == 0
    assert run_program("pull", RUN_URL, tmp_path / "copy", *(["--tag", tag] if tag else [])) == 0
    assert contents(tmp_path / "copy") == (contents(run) if tag is None else without(run, 20))


def pull_in_ranges(run: Path) -> None:
    """Pull in this process, one file at a time, its ranges in parallel."""
    stored_run.RANGE_BYTES = pull.RANGE_BYTES = RANGE
    program.main(["pull", RUN_URL, str(run), "--jobs", "1"])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("key", "num_before"),
    [
        (f"checkpoints/step_00000020/{MANIFEST}", 0),
        # The fifth range is requested when the first one is written.
        (f"checkpoints/step_00000020/{FILES[2]}", 4),
        ("model/config.json", 0),
    ],
)
def test_a_killed_pull_shows_no_run_and_continues(s3, run, tmp_path, ranges, key, num_before):  # noqa: F811
    copy, process = tmp_path / "copy", None

    def kill_it() -> None:
        wait_for(lambda: process, "the process's start")
        kill(process.pid)

    s3.instead["GET", f"runs/small/{key}"] = [lambda: None] * num_before + [kill_it]
    process = start_process(pull_in_ranges, copy)
    wait_for_end(process, "pull")
    assert process.exitcode == -signal.SIGKILL
    assert not copy.exists()
    s3.requests.clear()
    assert run_program("pull", RUN_URL, copy, "--jobs", "1") == 0
    assert contents(copy) == without(run, 10)
    order = [f"checkpoints/step_00000020/{name}" for name in FILES]
    again = order[order.index(key) :] if key in order else order * key.endswith(MANIFEST)
    assert list(dict.fromkeys(name for name in keys(s3, "GET") if name in order)) == again
    # Of the file that it was receiving, what it has written is not requested again.
    first = [request.key for request in s3.requests if request.range == f"bytes=0-{RANGE - 1}"]
    assert [name for name in again if f"runs/small/{name}" not in first and name.endswith(".bin")] == (
        [key] if num_before else []
    )


def test_a_beginning_that_is_of_another_object_is_received_again(s3, run, tmp_path, ranges):  # noqa: F811
    part = tmp_path / "copy.pull" / "checkpoints" / "step_00000020" / f"{FILES[2]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 10**6)
    assert run_program("pull", RUN_URL, tmp_path / "copy") == 0
    assert contents(tmp_path / "copy") == without(run, 10)


def pull_and_die(run: Path, number: int) -> None:
    """Pull in this process, which is killed at a change of the run's folder."""
    events = FileEvents(run)
    events.kill_at, events.is_on = number, True
    program.main(["pull", RUN_URL, str(run)])


@pytest.mark.integration
def test_kills_leave_a_run_that_resumes_from_one_of_its_states(s3, run, tmp_path):  # noqa: F811
    write_best(run, BestRecord("step_00000020", 20, "accuracy", 0.5, "data"))
    assert run_program("push", run, RUN_URL) == 0
    older = make_run(tmp_path / "older", 10, 20)
    flip_byte(older / "checkpoints" / "step_00000020" / "rank_0.bin")
    (older / "metrics.jsonl").write_text((older / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    copy = tmp_path / "copy"
    shutil.copytree(older, copy)
    events = FileEvents(copy)
    events.is_on = True
    assert run_program("pull", RUN_URL, copy) == 0
    events.is_on = False
    assert names(copy) == ["step_00000010", "step_00000020"]
    assert (copy / "checkpoints" / "step_00000020.damaged").is_dir()
    # The last third of the changes are renames and removals, once all is received.
    for number in range(events.count * 2 // 3, events.count, max(1, events.count // 9)):
        shutil.rmtree(copy)
        shutil.copytree(older, copy)
        process = start_process(pull_and_die, copy, number)
        wait_for_end(process, "the pull")
        assert process.exitcode in (-signal.SIGKILL, 0)
        good = [folder.name for folder in store.list_checkpoints(copy) if not store.verify(folder)]
        assert good in (["step_00000010"], ["step_00000010", "step_00000020"])
        steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
        assert steps[: len(good)] == [10, 20][: len(good)]
        assert run_program("pull", RUN_URL, copy) == 0
        assert contents(run).items() <= contents(copy).items()
        assert not (copy / "pull.tmp").exists()


def test_a_damaged_object_is_skipped_or_refused_by_its_name(s3, run, tmp_path, capsys, caplog):  # noqa: F811
    key = f"{CHECKPOINTS}/step_00000020/rank_1.bin"
    content = bytearray(s3.call("GET", key))
    content[100] ^= 1
    s3.put(key, bytes(content))
    assert run_program("verify", RUN_URL) == 78
    shown = capsys.readouterr()
    assert "step_00000020  DAMAGED: rank_1.bin does not match its SHA-256" in shown.out
    assert "step_00000010  good" in shown.out
    assert "step_00000020: damaged; delete" in shown.err
    assert run_program("pull", RUN_URL, tmp_path / "one", "--tag", "step_00000020") == 78
    assert "rank_1.bin does not match its SHA-256; delete this checkpoint there" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()
    assert run_program("pull", RUN_URL, tmp_path / "two") == 0
    assert "step_00000020 is damaged and skipped" in caplog.text
    assert names(tmp_path / "two") == ["step_00000010"]
    s3.put(key.replace("20/", "10/"), b"short")
    assert run_program("pull", RUN_URL, tmp_path / "three") == 78
    assert "none of its checkpoints is good" in capsys.readouterr().err


def test_a_manifest_that_leads_out_of_the_folder_is_refused(s3, run, tmp_path, capsys):  # noqa: F811
    key = f"{CHECKPOINTS}/step_00000020/{MANIFEST}"
    listed = json.loads(s3.call("GET", key))
    listed["files"][0]["name"] = "../../../outside"
    s3.put(key, json.dumps(listed).encode())
    s3.put("runs/small/outside", b"x")
    assert run_program("pull", RUN_URL, tmp_path / "copy", "--tag", "step_00000020") == 78
    assert "'../../../outside' points outside the folder" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()


def test_a_newer_checkpoint_of_the_folder_is_not_replaced(run, capsys):
    folder = commit(run, 30)
    before = contents(run)
    assert run_program("pull", RUN_URL, run) == 78
    assert "has step_00000030, which is newer than step_00000020" in capsys.readouterr().err
    assert contents(run) == before
    flip_byte(folder / "rank_0.bin")
    assert run_program("pull", RUN_URL, run) == 0
    assert "step_00000020 is there and good" in capsys.readouterr().out


def test_an_older_folder_of_the_run_is_brought_up_to_date(run, tmp_path):
    older = make_run(tmp_path / "older", 10)
    assert run_program("pull", RUN_URL, older) == 0
    assert contents(older) == contents(run)


def test_a_folder_of_another_run_is_refused(run, tmp_path, capsys):
    other = make_run(tmp_path / "other")
    (other / "config.yaml").write_text("training: {steps: 7}")
    assert run_program("pull", RUN_URL, other) == 78
    assert "so it is another run; name a new folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_program("pull", RUN_URL, tmp_path / "empty") == 0
    assert contents(tmp_path / "empty") == without(run, 10)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    assert run_program("pull", RUN_URL, tmp_path / "full") == 78
    assert "exists and is no folder of the run" in capsys.readouterr().err


def test_a_run_in_use_is_refused(run, tmp_path, capsys):
    older = make_run(tmp_path / "older", 10)
    write_heartbeat_of(os.getppid(), older)
    assert run_program("pull", RUN_URL, older) == 78
    assert f"pid {os.getppid()} on" in capsys.readouterr().err
    assert names(older) == ["step_00000010"]


def test_a_checkpoint_that_retention_removes_meanwhile_gives_the_next(s3, run, tmp_path):  # noqa: F811
    def train_on() -> None:
        for step in (30, 40):
            commit(run, step)
        store.prune(run, 1, 0)
        Pusher(run, RUN_URL).follow(lambda: Retention(1, 0), 0.001, lambda: True)

    s3.instead["GET", f"{CHECKPOINTS}/step_00000020/rank_0.bin"] = [train_on]
    assert run_program("pull", RUN_URL, tmp_path / "copy", "--jobs", "1") == 0
    assert contents(tmp_path / "copy") == contents(run)


def test_a_pull_from_a_throttled_store_is_tried_again(s3, run, tmp_path):  # noqa: F811
    s3.instead["GET", f"{CHECKPOINTS}/step_00000020/rank_0.bin"] = [THROTTLED, 5_000, THROTTLED]
    s3.instead["HEAD", "*"] = [THROTTLED]
    assert run_program("pull", RUN_URL, tmp_path / "copy") == 0
    assert contents(tmp_path / "copy") == without(run, 10)
    s3.instead["GET", f"{CHECKPOINTS}/step_00000020/rank_0.bin"] = [THROTTLED] * 5
    assert run_program("pull", RUN_URL, tmp_path / "other") == 1
    assert not (tmp_path / "other").exists()


def test_expired_credentials_end_a_pull_with_status_78(s3, run, tmp_path, capsys):  # noqa: F811
    s3.instead["GET", f"{CHECKPOINTS}/step_00000020/{FILES[2]}"] = [EXPIRED] * 2
    assert run_program("pull", RUN_URL, tmp_path / "copy", "--jobs", "1") == 78
    output = capsys.readouterr().err
    assert f"{FILES[2]}: the credentials expired (ExpiredToken as a sentence); renew them (AWS_PROFILE" in output
    assert "test-secret" not in output
    assert not (tmp_path / "copy").exists()
    assert run_program("pull", RUN_URL, tmp_path / "copy") == 0
    assert contents(tmp_path / "copy") == without(run, 10)


def test_incomplete_checkpoints_are_listed_and_not_pulled(s3, run, tmp_path, capsys):  # noqa: F811
    s3.call("DELETE", f"{CHECKPOINTS}/step_00000020/{MANIFEST}")
    assert run_program("ls", RUN_URL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step_00000010", "0.1"], ["step_00000020", "incomplete:"]]
    assert run_program("pull", RUN_URL, tmp_path / "copy") == 0
    assert contents(tmp_path / "copy") == without(run, 20)
    assert run_program("pull", RUN_URL, tmp_path / "copy", "--tag", "step_00000020") == 78
    assert "no complete checkpoint in" in capsys.readouterr().err
    for command in (["ls", f"{URL}/none"], ["pull", f"{URL}/none", tmp_path / "none"]):
        assert run_program(*command) == 78
        assert "has no complete checkpoint; name the URL of a run" in capsys.readouterr().err


def test_a_pulled_run_can_be_pushed_again(s3, run, tmp_path):  # noqa: F811
    assert run_program("pull", RUN_URL, tmp_path / "copy") == 0
    remove(run / "checkpoints" / "step_00000010")
    commit(tmp_path / "copy", 30)
    before = checkpoint_of(tmp_path / "copy", 20)
    s3.requests.clear()
    assert run_program("push", tmp_path / "copy", RUN_URL) == 0
    assert {name.split("/")[1] for name in keys(s3, "PUT") if "/step_" in name} == {"step_00000030"}
    assert before.items() <= stored(s3).items()
