"""A run is copied to a real S3 server: complete or absent, through kills, throttling, damage and retention."""

import json
import os
import re
import signal
from collections import Counter
from threading import Event

import pytest

from pretrain.checkpoints import has_ended
from tests.checkpoint.copies import (
    CHECKPOINTS,
    FILES,
    RUN_URL,
    checkpoint_of,
    commit,
    complete_and_good,
    contents,
    environment,
    flip_byte,
    keys,
    kill,
    make_run,
    remove,
    run_program,
    stored,
    write_heartbeat_of,
)
from tests.commands import start_command
from tests.s3 import URL, Refusal, s3, s3_server  # noqa: F401  (two are fixtures)
from tests.waiting import text_of, wait_for, wait_for_end
from unimo3 import object_store
from unimo3.checkpoint import push, store
from unimo3.checkpoint.best_record import BestRecord, write_best
from unimo3.checkpoint.manifest import MANIFEST
from unimo3.checkpoint.push import Pusher, Retention
from unimo3.checkpoint.stored_run import StoredRun
from unimo3.errors import ConfigError

THROTTLED = Refusal(503, "SlowDown")
# Requests of a push of one checkpoint, which is written in this order with --jobs 1.
ORDER = ["config.yaml", "metrics.jsonl", "model/config.json", "ledger/rank_00000.jsonl"]
ORDER += [f"checkpoints/step_00000010/{name}" for name in (*FILES, MANIFEST)] + ["checkpoints/latest"]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "small", 10, 20)


def names(folders):
    return [folder.name for folder in folders]


def test_all_that_a_resume_reads_is_stored_the_manifest_last(s3, run, capsys):  # noqa: F811
    write_best(run, BestRecord("step_00000010", 10, "accuracy", 0.5, "data"))
    assert run_program("push", run, RUN_URL, "--jobs", "1") == 0
    objects = stored(s3)
    assert objects.pop("checkpoints/latest") == b"step_00000020"
    assert objects == contents(run)
    sent = keys(s3, "PUT")
    tags = [f"checkpoints/step_000000{step}/{name}" for step in (20, 10) for name in (*FILES, MANIFEST)]
    assert [name for name in sent if "/step_" in name] == tags
    assert sent.index("metrics.jsonl") < sent.index(tags[0])
    assert sent[-2:] == ["checkpoints/latest", "best.json"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step_00000020", "step_00000010"]
    assert all(" MB/s" in line and "4 files sent" in line for line in lines)
    assert not list(run.glob("push_*.jsonl"))


def test_a_second_push_sends_only_new_checkpoints(s3, run):  # noqa: F811
    assert run_program("push", run, RUN_URL) == 0
    commit(run, 30)
    s3.requests.clear()
    assert run_program("push", run, RUN_URL) == 0
    assert Counter(name for name in keys(s3, "PUT") if "/step_" in name) == Counter(
        f"checkpoints/step_00000030/{name}" for name in (*FILES, MANIFEST)
    )
    assert complete_and_good() == ["step_00000010", "step_00000020", "step_00000030"]


@pytest.mark.parametrize("tag", ["step_00000010", "best"])
def test_one_checkpoint_is_pushed_by_its_tag(s3, run, tag):  # noqa: F811
    write_best(run, BestRecord("step_00000010", 10, "accuracy", 0.5, "data"))
    assert run_program("push", run, RUN_URL, "--tag", tag) == 0
    assert complete_and_good() == ["step_00000010"]


@pytest.mark.integration
@pytest.mark.parametrize("point", ["config.yaml", f"checkpoints/step_00000010/{FILES[0]}", *ORDER[-3:-1]])
def test_a_killed_push_continues_and_shows_no_half_checkpoint(s3, tmp_path, point):  # noqa: F811
    run = make_run(tmp_path / "small", 10)
    log = tmp_path / "output"
    process = None

    def kill_it() -> None:
        wait_for(lambda: process, "the process's start")
        kill(process.pid)

    s3.instead["PUT", f"runs/small/{point}"] = [kill_it]
    process = start_command("pretrain.checkpoints", ["push", run, RUN_URL, "--jobs", "1"], environment(), log)
    wait_for_end(process, "push", text_of(log))
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    wait_for(lambda: point in StoredRun(RUN_URL).objects, "the object that the store had received")
    sent = ORDER[: ORDER.index(point) + 1]
    assert keys(s3, "PUT") == sent
    assert complete_and_good() == ["step_00000010"] * (f"checkpoints/step_00000010/{MANIFEST}" in sent)
    s3.requests.clear()
    assert run_program("push", run, RUN_URL) == 0
    # All that was recorded, so without the object at whose arrival the process was killed, is not sent again.
    again = {name for name in keys(s3, "PUT") if "/step_" in name}
    assert again == ({name for name in ORDER[ORDER.index(point) :] if "/step_" in name} if len(sent) < 9 else set())
    assert complete_and_good() == ["step_00000010"]
    assert checkpoint_of(run, 10).items() <= stored(s3).items()


def test_a_damaged_file_is_not_pushed_and_the_other_checkpoints_are(s3, run, capsys):  # noqa: F811
    flip_byte(run / "checkpoints" / "step_00000020" / "rank_1.bin")
    assert run_program("push", run, RUN_URL) == 78
    assert "1 damaged checkpoints are not copied: step_00000020: rank_1.bin does not match" in capsys.readouterr().err
    assert complete_and_good() == ["step_00000010"]
    assert not StoredRun(RUN_URL).files_of("step_00000020")
    assert stored(s3)["checkpoints/latest"] == b"step_00000010"


@pytest.mark.parametrize("damage", ["missing", "shorter", "no manifest"])
def test_a_checkpoint_that_is_not_complete_there_is_completed(s3, run, damage):  # noqa: F811
    assert run_program("push", run, RUN_URL) == 0
    key = f"{CHECKPOINTS}/step_00000010/{MANIFEST if damage == 'no manifest' else 'rank_0.bin'}"
    if damage == "shorter":
        s3.put(key, b"short")
    else:
        s3.call("DELETE", key)
    assert run_program("push", run, RUN_URL) == 0
    assert complete_and_good() == ["step_00000010", "step_00000020"]


def test_a_step_saved_again_replaces_the_one_there_manifest_first(s3, run):  # noqa: F811
    assert run_program("push", run, RUN_URL) == 0
    remove(run / "checkpoints" / "step_00000020")
    commit(run, 20, seed=1)
    s3.put(f"{CHECKPOINTS}/step_00000020/of_another_world.bin", b"x")
    s3.requests.clear()
    seen = []
    s3.instead["PUT", f"{CHECKPOINTS}/step_00000020/rank_0.bin"] = [lambda: seen.append(complete_and_good())]
    assert run_program("push", run, RUN_URL) == 0
    assert seen == [["step_00000010"]]
    objects = stored(s3)
    assert {name: objects[name] for name in objects if "step_00000020" in name} == checkpoint_of(run, 20)


def test_a_throttled_store_is_tried_again(s3, run, capsys):  # noqa: F811
    for key in (f"{CHECKPOINTS}/step_00000020/rank_0.bin", f"{CHECKPOINTS}/step_00000010/{MANIFEST}"):
        s3.instead["PUT", key] = [THROTTLED] * 3
    s3.instead["HEAD", "*"] = [THROTTLED]
    assert run_program("push", run, RUN_URL) == 0
    assert complete_and_good() == ["step_00000010", "step_00000020"]
    s3.instead["PUT", f"{CHECKPOINTS}/step_00000030/rank_0.bin"] = [THROTTLED] * 5
    commit(run, 30)
    assert run_program("push", run, RUN_URL) == 1
    assert complete_and_good() == ["step_00000010", "step_00000020"]


def test_expired_credentials_end_a_push_with_status_78(s3, run, capsys):  # noqa: F811
    s3.always = Refusal(400, "ExpiredToken")
    assert run_program("push", run, RUN_URL) == 78
    output = capsys.readouterr().err
    assert "the credentials expired" in output
    assert "test-secret" not in output


def test_only_the_part_that_failed_is_sent_again(s3, tmp_path):  # noqa: F811
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    s3.instead["PUT", "large"] = [lambda: None, THROTTLED]
    object_store.put_file(path, f"{URL}/large")
    assert keys(s3, "PUT") == ["large"] * 3
    assert object_store.look_up(f"{URL}/large").num_bytes == 100 * 2**20
    # The checksum of the parts is the one that was expected: nothing is read back.
    assert not keys(s3, "GET")


def test_another_run_or_other_things_at_the_url_are_refused(s3, run, tmp_path, capsys):  # noqa: F811
    s3.put("runs/small/notes.txt", b"x")
    assert run_program("push", run, RUN_URL) == 78
    assert "contains notes.txt and no config.yaml" in capsys.readouterr().err
    other = make_run(tmp_path / "other", 10)
    (other / "config.yaml").write_text("training: {steps: 7}")
    s3.put("runs/small/config.yaml", (other / "config.yaml").read_bytes())
    assert run_program("push", run, RUN_URL) == 78
    assert "so another run is there; choose another URL" in capsys.readouterr().err
    assert not keys(s3, "PUT")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "/mnt/copy"], "/mnt/copy: is no URL of an object store"),
        (["RUN", "s3://key:secret@bucket/x"], "is no URL of an object store"),
        (["RUN", RUN_URL, "--jobs", "0"], "--jobs 0: at least 1 is needed"),
        (["RUN", RUN_URL, "--every", "0"], "--every 0.0: a number of seconds above 0"),
        (["RUN", RUN_URL, "--tag", "step_7"], "no such checkpoint .*there are: step_00000010, step_00000020"),
        (["RUN", RUN_URL, "--tag", "best"], "best.json names none"),
        (["RUN", RUN_URL, "--tag", "step_00000010", "--follow"], "--follow copies all checkpoints"),
        (["RUN/model", RUN_URL], "is no run's folder, it has no config.yaml"),
    ],
)
def test_wrong_arguments_of_push_end_with_status_78(s3, run, capsys, arguments, message):  # noqa: F811
    assert (
        run_program("push", *(word.replace("RUN", str(run)) if "//" not in word else word for word in arguments)) == 78
    )
    output = capsys.readouterr().err
    assert re.search(message, output)
    assert "secret" not in output


def test_one_process_pushes_a_run_to_a_url(s3, run):  # noqa: F811
    first = Pusher(run, RUN_URL)
    with first._locked(), pytest.raises(ConfigError, match="another process pushes it"):
        Pusher(run, RUN_URL).push()
    assert Pusher(run, f"{URL}/elsewhere").push() == []


def test_following_copies_and_removes_as_the_training_does(s3, tmp_path):  # noqa: F811
    run = make_run(tmp_path / "small")
    steps = iter(range(10, 80, 10))
    at_manifest: list[tuple[str, list[str]]] = []

    def train_on() -> bool:
        """What a training does between two looks."""
        step = next(steps, None)
        if step is None:
            return True
        folder = commit(run, step)
        if step == 20:
            write_best(run, BestRecord("step_00000020", 20, "accuracy", 0.5, "data"))
        store.prune(run, 2, 30, known_good=folder)
        s3.instead["PUT", f"{CHECKPOINTS}/{folder.name}/{MANIFEST}"] = [
            lambda: at_manifest.append((folder.name, complete_and_good()))
        ]
        return False

    pusher = Pusher(run, RUN_URL)
    assert pusher.follow(lambda: Retention(2, 30), 0.001, train_on) == []
    assert complete_and_good() == names(store.list_checkpoints(run))
    assert complete_and_good() == [f"step_000000{step}" for step in (20, 30, 60, 70)]
    # Before the newer one is complete, the older ones are there.
    assert at_manifest[3] == ("step_00000040", ["step_00000010", "step_00000020", "step_00000030"][-2:])
    assert [len(complete) for _, complete in at_manifest] == [0, 1, 2, 2, 3, 4, 4]
    for tag in ("step_00000010", "step_00000040", "step_00000050"):
        deleted = [name for name in keys(s3, "DELETE") if f"/{tag}/" in name]
        assert deleted[0].endswith(MANIFEST)
        assert len(deleted) == len(FILES) + 1
    assert json.loads(stored(s3)["best.json"])["tag"] == "step_00000020"
    assert stored(s3)["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()


def test_following_survives_checkpoints_removed_while_it_copies_them(s3, run, capsys):  # noqa: F811
    folder = run / "checkpoints" / "step_00000020"
    s3.instead["PUT", f"{CHECKPOINTS}/step_00000020/{FILES[1]}"] = [lambda: (commit(run, 30), remove(folder))]
    ends = iter([False, True])
    assert Pusher(run, RUN_URL, 1).follow(lambda: Retention(3, 0), 0.001, lambda: next(ends)) == []
    assert "step_00000020: removed from" in capsys.readouterr().out
    assert StoredRun(RUN_URL).begun() == complete_and_good() == ["step_00000010", "step_00000030"]


def test_following_removes_what_a_killed_push_left(s3, run):  # noqa: F811
    assert run_program("push", run, RUN_URL) == 0
    s3.call("DELETE", f"{CHECKPOINTS}/step_00000010/{MANIFEST}")
    remove(run / "checkpoints" / "step_00000010")
    Pusher(run, RUN_URL).follow(lambda: Retention(3, 0), 0.001, lambda: True)
    assert StoredRun(RUN_URL).begun() == ["step_00000020"]


def test_following_never_removes_what_the_run_has_not_reached(s3, run, caplog):  # noqa: F811
    commit(run, 30)
    assert run_program("push", run, RUN_URL) == 0
    for step in (20, 30):
        remove(run / "checkpoints" / store.tag_of(step))
    Pusher(run, RUN_URL).follow(lambda: Retention(1, 0), 0.001, lambda: True)
    assert complete_and_good() == ["step_00000010", "step_00000020", "step_00000030"]
    assert "step_00000020, step_00000030: later than the run's newest checkpoint" in caplog.text


def test_following_tries_again_when_the_store_was_away(s3, run, caplog):  # noqa: F811
    pusher = Pusher(run, RUN_URL)
    s3.instead["GET", ""] = [THROTTLED] * 7
    ends = iter([False, False, True])
    assert pusher.follow(lambda: Retention(3, 0), 0.001, lambda: next(ends)) == []
    assert "at the last of 5 tries; see whether the store works, then start again; trying again in" in caplog.text
    assert complete_and_good() == ["step_00000010", "step_00000020"]


@pytest.mark.integration
def test_follow_waits_for_the_run_and_ends_with_it(s3, tmp_path):  # noqa: F811
    run, log = tmp_path / "small", tmp_path / "output"
    words = ["push", run, RUN_URL, "--follow", "--every", "0.05"]
    process = start_command("pretrain.checkpoints", words, environment(), log)
    wait_for(lambda: "waiting for the run to begin" in text_of(log)(), "the wait", text_of(log))
    make_run(tmp_path / "made", 10).rename(run)
    wait_for(lambda: complete_and_good() == ["step_00000010"], "the first checkpoint", text_of(log))
    commit(run, 50)
    store.prune(run, 1, 0)
    commit(run, 60)
    wait_for_end(process, "push", text_of(log))
    assert process.exitcode == 0, log.read_text()
    # As the newest checkpoint's settings have it, not as the run's first start had it.
    assert complete_and_good() == ["step_00000050", "step_00000060"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("PUT", f"step_00000040/{FILES[1]}"),
        ("PUT", f"step_00000040/{MANIFEST}"),
        ("DELETE", f"step_00000010/{MANIFEST}"),
        ("DELETE", f"step_00000010/{FILES[0]}"),
        ("DELETE", f"step_00000020/{MANIFEST}"),
    ],
)
def test_following_that_was_killed_continues_with_copies_and_removals(s3, run, tmp_path, method, name):  # noqa: F811
    assert run_program("push", run, RUN_URL) == 0
    folder = commit(run, 60)
    for step in (30, 40):
        commit(run, step)
    store.prune(run, 2, 30, known_good=folder)
    log, process = tmp_path / "output", None

    def kill_it() -> None:
        wait_for(lambda: process, "the process's start")
        kill(process.pid)

    s3.instead[method, f"{CHECKPOINTS}/{name}"] = [kill_it]
    words = ["push", run, RUN_URL, "--follow", "--every", "0.05", "--jobs", "1"]
    process = start_command("pretrain.checkpoints", words, environment(), log)
    wait_for_end(process, "push", text_of(log))
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    key, is_put = f"checkpoints/{name}", method == "PUT"
    wait_for(lambda: (key in StoredRun(RUN_URL).objects) == is_put, "the request that the store had received")
    assert {"step_00000040", "step_00000060"} <= {*complete_and_good()} or is_put
    assert run_program(*words) == 0
    assert complete_and_good() == StoredRun(RUN_URL).begun() == names(store.list_checkpoints(run))
    assert complete_and_good() == ["step_00000030", "step_00000040", "step_00000060"]


@pytest.mark.integration
@pytest.mark.parametrize("is_idle", [True, False])
def test_a_stop_signal_ends_a_push_after_the_files_under_way(s3, run, tmp_path, is_idle):  # noqa: F811
    log, process = tmp_path / "output", None

    def stop() -> None:
        wait_for(lambda: process, "the process's start")
        os.kill(process.pid, signal.SIGTERM)

    key = f"{CHECKPOINTS}/" + ("latest" if is_idle else f"step_00000020/{FILES[1]}")
    s3.instead["PUT", key] = [stop]
    words = ["push", run, RUN_URL, "--follow", "--every", "600", "--jobs", "1"]
    process = start_command("pretrain.checkpoints", words, environment(), log)
    wait_for_end(process, "push", text_of(log))
    assert process.exitcode == (0 if is_idle else 75), log.read_text()
    assert ("asked to stop; start the same command to copy the rest" in log.read_text()) is not is_idle
    assert complete_and_good() == (["step_00000010", "step_00000020"] if is_idle else [])
    assert not is_idle or keys(s3, "PUT")[-1] == "checkpoints/latest"
    assert is_idle or keys(s3, "PUT")[-1] == f"checkpoints/step_00000020/{FILES[1]}"
    assert run_program("push", run, RUN_URL) == 0
    assert complete_and_good() == ["step_00000010", "step_00000020"]


def test_a_run_has_ended_when_its_last_step_is_saved(tmp_path):
    run = make_run(tmp_path / "small", 50)
    assert not has_ended(run)
    commit(run, 60)
    assert has_ended(run)
    write_heartbeat_of(os.getppid(), run)
    assert not has_ended(run)  # the last evaluation may still name the best checkpoint


def test_a_stop_before_the_first_file_copies_nothing(s3, run):  # noqa: F811
    stop = Event()
    stop.set()
    with pytest.raises(push.Interrupted):
        Pusher(run, RUN_URL, 4, stop).push()
    assert not keys(s3, "PUT")
