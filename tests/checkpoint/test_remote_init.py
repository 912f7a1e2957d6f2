"""What a new run starts from in an object store: exported folders, runs and checkpoints, verified."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.checkpoint.copies import run_program as run_checkpoints
from tests.checkpoint.exporting import contents, flip, run_program
from tests.s3 import URL, Refusal, s3, s3_server  # noqa: F401  (two are fixtures)
from unimo3 import small_files
from unimo3.checkpoint import remote_init
from unimo3.checkpoint.initial_weights import (
    config_errors,
    exports,
    lacks_weights,
    model_files_of,
    tokenizer_of,
    weights_of,
)
from unimo3.errors import CheckpointError, UnreachableError
from unimo3.object_store import StoreError

RUN_URL = f"{URL}/runs/fp32"
EXPORT_URL = f"{URL}/exported"
EXPIRED = Refusal(400, "ExpiredToken")
EXPIRED_HINT = "the credentials expired (ExpiredToken as a sentence); renew them (AWS_PROFILE"


@pytest.fixture
def run(s3, run_copy):  # noqa: F811
    """A run with two checkpoints, which is in the store."""
    copy: Path = run_copy("fp32")
    (copy / "config.yaml").write_text("checkpoint:\n  keep_last: 2\n")
    assert run_checkpoints("push", copy, RUN_URL) == 0
    return copy


@pytest.fixture
def exported(s3, run, tmp_path):  # noqa: F811
    """An exported folder, which is in the store."""
    out = tmp_path / "exported"
    assert run_program(run, "--out", out, "--dtype", "fp32") == 0
    for name, content in contents(out).items():
        s3.put(f"exported/{name}", content)
    return out


@pytest.fixture(autouse=True)
def _as_a_new_process():
    _forget()


def _forget():
    small_files.fetch_small_files.cache_clear()
    remote_init.look_at.cache_clear()


@pytest.mark.parametrize("tag", [None, "step_00000002"])
def test_an_export_from_the_store_equals_that_of_the_run(run, tmp_path, capsys, tag):
    words = ["--dtype", "fp32", *(["--tag", tag] if tag else [])]
    assert run_program(run, "--out", tmp_path / "one", *words) == 0
    capsys.readouterr()
    assert run_program(RUN_URL, "--out", tmp_path / "two", *words) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: one[name] for name in one if name != "README.md"} == {
        name: two[name] for name in two if name != "README.md"
    }
    assert f"pulled to {tmp_path / 'two.source'}, which the end of the export removes" in capsys.readouterr().out
    assert not (tmp_path / "two.source").exists()


def test_an_export_that_failed_uses_its_copy_again(s3, run, tmp_path, capsys):  # noqa: F811
    out, blocked = tmp_path / "out", tmp_path / "out.partial"
    blocked.write_text("a file where a folder is needed")
    assert run_program(RUN_URL, "--out", out) == 78
    blocked.unlink()
    s3.requests.clear()
    assert run_program(RUN_URL, "--out", out) == 0
    assert not [request for request in s3.requests if request.method == "GET" and request.key.endswith(".pt")]
    assert run_program(f"{URL}/none", "--out", tmp_path / "none") == 78
    assert "has no complete checkpoint; name the URL of a run" in capsys.readouterr().err


def test_a_run_in_the_store_is_exported_into_the_new_run(run, tmp_path):
    new = tmp_path / "new"
    files = model_files_of(RUN_URL, new)
    assert contents(Path(files)) == contents(run / "model")
    assert config_errors(files) == []
    assert exports(RUN_URL, new)
    assert lacks_weights(RUN_URL, new)
    assert tokenizer_of(RUN_URL, new) == f"{RUN_URL}/model"
    newest = load_file(f"{weights_of(RUN_URL, new)}/model.safetensors")
    expected = load_file(f"{weights_of(str(run), tmp_path / 'other')}/model.safetensors")
    assert newest.keys() == expected.keys()
    assert all(newest[name].equal(expected[name]) for name in newest)
    assert sorted(path.name for path in new.iterdir()) == ["init"]
    assert not exports(RUN_URL, new)
    assert not lacks_weights(RUN_URL, new)
    assert tokenizer_of(RUN_URL, new) == str(new / "init")
    earlier = weights_of(f"{RUN_URL}/checkpoints/step_00000002", new)
    assert not load_file(f"{earlier}/model.safetensors")["embed.weight"].equal(newest["embed.weight"])


def test_a_later_start_needs_the_store_only_for_a_newer_checkpoint(s3, run, tmp_path):  # noqa: F811
    new = tmp_path / "new"
    later = run / "checkpoints" / "step_00000004"
    for name in contents(later):
        s3.call("DELETE", f"runs/fp32/checkpoints/step_00000004/{name}")
    before = load_file(f"{weights_of(RUN_URL, new)}/model.safetensors")
    assert run_checkpoints("push", run, RUN_URL) == 0
    s3.requests.clear()
    assert weights_of(RUN_URL, new) == model_files_of(RUN_URL, new) == str(new / "init")
    assert not s3.requests
    after = load_file(f"{weights_of(RUN_URL, new, newest=True)}/model.safetensors")
    assert not after["embed.weight"].equal(before["embed.weight"])
    s3.requests.clear()
    weights_of(RUN_URL, new, newest=True)
    assert not [request for request in s3.requests if request.key.endswith(".pt")]


def test_an_exported_folder_in_the_store_is_copied_and_verified(s3, exported, tmp_path):  # noqa: F811
    new = tmp_path / "new"
    assert contents(Path(model_files_of(EXPORT_URL, new))).keys() == contents(exported).keys() - {"model.safetensors"}
    s3.instead["GET", "exported/model.safetensors"] = [Refusal(503, "SlowDown")]
    assert weights_of(EXPORT_URL, new) == str(new / "init")
    assert contents(exported).items() <= contents(new / "init").items()
    shutil.rmtree(new)
    flip(exported / "model.safetensors", (exported / "model.safetensors").stat().st_size - 3)
    s3.put("exported/model.safetensors", (exported / "model.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"1 tensors are not those that were exported, such as .*copy the exported"
    ):
        weights_of(EXPORT_URL, new)
    assert not (new / "init").exists()


def test_expired_credentials_leave_neither_export_nor_initial_weights(s3, exported, run, tmp_path, capsys):  # noqa: F811
    new, out = tmp_path / "new", tmp_path / "out"
    weights = [f"runs/fp32/checkpoints/step_00000004/{name}" for name in contents(run / "checkpoints/step_00000004")]
    capsys.readouterr()
    for key in (*weights, "exported/model.safetensors"):
        s3.instead["GET", key] = [EXPIRED] * 8
    assert run_program(RUN_URL, "--out", out) == 78
    assert EXPIRED_HINT in capsys.readouterr().err
    for init in (RUN_URL, EXPORT_URL):
        with pytest.raises(CheckpointError, match=re.escape(EXPIRED_HINT)) as error:
            weights_of(init, new)
        assert error.value.exit_status == 78
        assert not (new / "init").exists()
    assert not out.exists()
    s3.instead.clear()
    assert run_program(RUN_URL, "--out", out) == 0
    s3.always = EXPIRED
    for init in (RUN_URL, EXPORT_URL):
        _forget()
        with pytest.raises(StoreError, match=re.escape(EXPIRED_HINT)):  # before the ranks meet
            model_files_of(init, tmp_path / "newer")


def test_what_is_no_weights_is_refused(s3, run, tmp_path):  # noqa: F811
    message = r"init or model.init: 's3://.*/model': is neither an exported folder"
    with pytest.raises(CheckpointError, match=message) as error:
        model_files_of(f"{URL}/none/model", tmp_path / "new")
    assert error.value.exit_status == 78
    with pytest.raises(CheckpointError, match="--tag step_00000009: no complete checkpoint in"):
        model_files_of(f"{RUN_URL}/checkpoints/step_00000009", tmp_path / "new")
    s3.always = Refusal(503, "SlowDown")
    with pytest.raises(UnreachableError):
        model_files_of(RUN_URL, tmp_path / "new")
    assert run_program(RUN_URL, "--out", tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()
