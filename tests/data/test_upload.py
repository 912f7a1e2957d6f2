"""Conversions into an S3 bucket: complete there or absent, continued after an interruption, refused early."""

import json
import signal
from pathlib import Path

import pytest

from tests.checkpoint.copies import kill
from tests.data.conftest import convert
from tests.data.test_parallel import run
from tests.s3 import BUCKET, URL, Refusal, s3, s3_server  # noqa: F401  (two are fixtures)
from tests.spawn import start_process
from tests.waiting import wait_for, wait_for_end
from unimo3 import object_store
from unimo3.data.cache import ShardCache
from unimo3.data.index import ShardIndex

OUT = f"{URL}/sets/coco"
EXPIRED = Refusal(400, "ExpiredToken")
SMALL = ("--shard-size", "4", "--tokenizer-vocab", "300")


@pytest.fixture
def command(source, tmp_path, monkeypatch):
    """Run the conversion that made the shards of `coco`, with `OUT` as its output; its status."""
    monkeypatch.chdir(tmp_path)

    def start(*options: str, out: str = OUT) -> int:
        return convert("coco", "--src", str(source), "--out", out, *SMALL, *options)

    return start


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored() -> dict[str, bytes]:
    return {name: b"".join(object_store.read(f"{OUT}/{name}")) for name in object_store.list_objects(OUT)}


def sent(store) -> list[str]:
    """Names of the objects that were written."""
    return [request.key.removeprefix("sets/coco/") for request in store.requests if request.method == "PUT"]


def test_the_objects_are_the_files_of_a_folder_indexes_last(s3, command, coco, tmp_path, capsys):  # noqa: F811
    assert command() == 0
    assert stored() == contents(coco)
    order = sent(s3)
    assert sorted(order) == sorted(contents(coco))
    assert {name.rpartition("/")[2] for name in order[-3:]} == {"index.json"}
    printed = capsys.readouterr().out
    assert f"{OUT}/train: 16 samples in 4 shards" in printed
    assert f"{OUT}: {len(order)} objects" in printed
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    index = ShardIndex(f"{OUT}/train", ShardCache(f"{OUT}/train", tmp_path / "cache", 10**9))
    assert index.fingerprint == ShardIndex(coco / "train").fingerprint


def test_an_interrupted_upload_sends_only_what_is_missing(s3, command, coco, tmp_path, capsys):  # noqa: F811
    key = "sets/coco/train/000001.tar"
    s3.instead["PUT", key] = [Refusal(403, "AccessDenied")]
    assert command("--staging", "stage") == 78
    assert f"DataError: {OUT}/train/000001.tar: access is denied" in capsys.readouterr().err
    assert not [name for name in object_store.list_objects(OUT) if name.endswith("index.json")]
    there = set(object_store.list_objects(OUT))
    assert contents(Path("stage")) == contents(coco)
    # One of them was replaced since.
    changed = min(name for name in there if name.endswith(".tar"))
    object_store.put_bytes(b"another", f"{OUT}/{changed}")
    s3.requests.clear()
    assert command("--staging", "stage") == 0
    assert set(sent(s3)) == {*contents(coco), changed} - (there - {changed})
    assert f"{len(there) - 1} were there already" in capsys.readouterr().out
    assert stored() == contents(coco)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.integration
@pytest.mark.parametrize("name", ["train/000001.tar", "train/index.json"])
def test_a_killed_upload_shows_no_half_split_and_continues(s3, command, source, coco, tmp_path, name):  # noqa: F811
    process = None

    def kill_it() -> None:
        wait_for(lambda: process, "the process's start")
        kill(process.pid)

    s3.instead["PUT", f"sets/coco/{name}"] = [kill_it]
    words = ["--src", str(source), "--out", OUT, "--staging", str(tmp_path / "stage"), *SMALL]
    process = start_process(convert, "coco", *words)
    wait_for_end(process, "the conversion")
    assert process.exitcode == -signal.SIGKILL
    wait_for(lambda: name in object_store.list_objects(OUT), "the object that the store had received")
    there = object_store.list_objects(OUT)
    readable = {name.partition("/")[0] for name in there if name.endswith("index.json")}
    assert readable <= ({"train", "val", "test"} if name.endswith("index.json") else set())
    assert {each for each in contents(coco) if each.partition("/")[0] in readable} <= there.keys()
    s3.requests.clear()
    assert command("--staging", str(tmp_path / "stage")) == 0
    assert stored() == contents(coco)
    # What was recorded; up to four more were on their way when the process was killed.
    assert len(sent(s3)) <= len(contents(coco)) - len(there) + 4
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_throttled_upload_is_complete(s3, command, coco):  # noqa: F811
    s3.instead["PUT", "*"] = [Refusal(503, "SlowDown")] * 3
    assert command() == 0
    assert stored() == contents(coco)


def test_a_prefix_with_objects_is_refused_before_anything_is_read(s3, command, tmp_path, capsys):  # noqa: F811
    object_store.put_bytes(b"x", f"{OUT}/thesis.txt")
    assert command() == 78
    assert f"--out {OUT}: 1 objects are there, such as thesis.txt; choose another prefix" in capsys.readouterr().err
    assert command("--overwrite") == 78
    assert "contains other things than shards, such as thesis.txt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert stored() == {"thesis.txt": b"x"}


def test_overwrite_replaces_a_conversion_its_indexes_first(s3, command, coco, capsys):  # noqa: F811
    assert command("--shard-size", "2") == 0
    old = set(object_store.list_objects(OUT))
    s3.requests.clear()
    s3.instead["PUT", "sets/coco/train/000002.tar"] = [EXPIRED] * 2
    assert command("--overwrite") == 78
    assert f"{OUT}/train/000002.tar: the credentials expired" in capsys.readouterr().err
    assert not [name for name in object_store.list_objects(OUT) if name.endswith("index.json")]
    deleted = next(n for n, request in enumerate(s3.requests) if request.method == "DELETE" or "delete" in request.key)
    assert deleted < next(n for n, request in enumerate(s3.requests) if request.method == "PUT")
    assert command("--overwrite") == 0
    assert stored() == contents(coco)
    assert len(old) > len(contents(coco))


def test_a_local_folder_of_another_command_is_never_sent(s3, command, coco, tmp_path, capsys):  # noqa: F811
    s3.instead["PUT", "sets/coco/train/000001.tar"] = [EXPIRED] * 2
    assert command() == 78
    capsys.readouterr()
    assert command("--quality", "90") == 78
    reason = f"--staging staging/{BUCKET}/sets/coco: exists and is of a command with other arguments"
    assert reason in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert command("--staging", "mine") == 78
    assert "--staging mine: exists and was not made to be sent" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "s3://key:secret@bucket/x"], "is no URL of an object store"),
        (["--out", "store://bucket/x"], "--out store://bucket/x: store: is not read by this program"),
        (["--out", "https://host/x"], "--out https://host/x: is not written by this program"),
        (["--out", "s3:/bucket/x"], "argument --out: s3:/bucket/x: is no URL, which has two slashes"),
        (["--out", "S3://bucket/x"], "--out S3://bucket/x: S3: is not read by this program"),
        (["--src", "s3://bucket/x"], "argument --src: s3://bucket/x: is no folder"),
        (["--verify"], f"--verify: reads a folder; copy {OUT} to one"),
        (["--out", "o", "--staging", "s"], "--staging s: only an --out in an object store has one"),
    ],
)
def test_urls_that_cannot_be_used_are_errors_of_the_options(command, tmp_path, capsys, options, message):
    assert command(*options) == 78
    printed = capsys.readouterr().err
    assert message in printed
    assert "secret" not in printed
    assert list(tmp_path.iterdir()) == []


def test_tars_are_not_indexed_in_a_bucket(capsys):
    assert convert("index", "--src", f"{URL}/tars") == 78
    assert "convert and index on a machine that has the files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refusal", "status", "message"),
    [
        (EXPIRED, 78, f"--out {OUT}: the credentials expired"),
        (Refusal(503, "SlowDown"), 1, "at the last of 5 tries"),
        (Refusal(404, "NoSuchBucket"), 78, "no such bucket or object"),
    ],
)
def test_a_store_that_refuses_ends_the_command_at_once(s3, command, tmp_path, capsys, refusal, status, message):  # noqa: F811
    s3.always = refusal
    assert command() == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_ranks_end_together_when_the_store_refuses(s3, source, tmp_path):  # noqa: F811
    s3.always = EXPIRED
    done = run("coco", "--src", source, "--out", OUT, "--staging", tmp_path / "staging", ranks=2)
    assert done.returncode == 78, done.stderr
    assert done.stderr.count("the credentials expired") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_an_upload_has_no_credentials(s3, command, monkeypatch):  # noqa: F811
    s3.instead["PUT", "sets/coco/train/000001.tar"] = [EXPIRED] * 2
    assert command("--staging", "stage") == 78
    lines = Path("stage.upload").read_text().splitlines()
    assert json.loads(lines[0])["url"] == OUT
    assert {"name", "bytes", "sha256", "identity"} == set(json.loads(lines[1]))
    assert "test-secret" not in Path("stage.upload").read_text()
