"""The export program: what it takes, from whom, what it writes in addition to weights, and what it refuses to open."""

import json
import os
import pickle
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.exporting import MODEL, OPTIM, newest, run_program, strip_to_plain
from tests.spawn import run_alone
from unimo3.checkpoint import export
from unimo3.checkpoint.best_record import BestRecord, write_best
from unimo3.model.unimo3 import Unimo3ForPreTraining


def test_the_folder_holds_weights_model_files_and_answers_and_no_pickle(run_copy, tmp_path, capsys):
    run = run_copy("bf16")
    (run / "model" / "answers.json").write_text('["yes", "no"]')
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left_by_a_killed_export").write_text("half")
    assert run_program(run, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "answers.json",
        "config.json",
        "export_report.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text()) == {"model_type": "odd", "dtype": "float16"}
    assert not (tmp_path / "out.partial").exists()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    shown = capsys.readouterr().out
    assert "8 tensors" in shown
    assert "step_00000004 as fp16" in shown


def test_the_newest_good_checkpoint_is_used_unless_one_is_named(run_copy, tmp_path, capsys):
    run = run_copy("bf16")
    (newest(run) / MODEL).write_bytes(b"damaged")
    assert run_program(run, "--out", tmp_path / "one") == 0
    assert json.loads((tmp_path / "one" / "export_report.json").read_text())["checkpoint"] == "step_00000002"
    assert run_program(run, "--out", tmp_path / "two", "--tag", "step_00000004") == 78
    assert f"is damaged ({MODEL} has 7 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/none", "--out", "OUT"], "no such folder"),
        (["RUN/model", "--out", "OUT"], "has no good checkpoint"),
        (["RUN", "--out", "RUN"], "exists and is no empty folder"),
        (["RUN", "--out", "OUT", "--max-shard-size", "1 parsec"], "--max-shard-size 1 parsec: a size such as"),
        (["RUN", "--out", "OUT", "--jobs", "0"], "--jobs 0: at least 1 is needed"),
        (["RUN", "--out", "OUT", "--tag", "../checkpoints/step_00000004"], "no such checkpoint"),
        (["RUN", "--out", "OUT", "--tag", "step_3"], "there are: step_00000002, step_00000004"),
    ],
)
def test_wrong_arguments_end_with_status_78(saved, tmp_path, capsys, arguments, message):
    paths = {"RUN": str(saved.root / "bf16"), "OUT": str(tmp_path / "out")}
    filled = [a.replace("RUN", paths["RUN"]).replace("OUT", paths["OUT"]) for a in arguments]
    assert run_program(*filled) == 78
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["parent", "parent and tag", "folder"])
def test_a_folder_written_by_deepspeed_gives_weights_index_and_report(saved, tmp_path, capsys, source):
    checkpoint = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    arguments = {"parent": [tmp_path / "plain"], "folder": [checkpoint]}.get(
        source, [tmp_path / "plain", "--tag", checkpoint.name]
    )
    if source == "parent and tag":
        (tmp_path / "plain" / "latest").unlink()
        (tmp_path / "plain" / "latest").write_text("elsewhere")
    out = tmp_path / "out"
    assert run_program(*arguments, "--out", out, "--max-shard-size", "100") == 0
    assert "weights, index and report only" in capsys.readouterr().out
    assert {path.name.split("-")[0] for path in out.iterdir()} == {
        "model",
        "model.safetensors.index.json",
        "export_report.json",
    }
    exported: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        exported |= load_file(path)
    # Names are another program's, whatever they begin with.
    expected = saved.results[0]["bf16"]["weights"]
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        wanted = weight.half() if weight.is_floating_point() else weight
        torch.testing.assert_close(exported[name], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_single_checkpoint_is_verified_and_keeps_the_users_paths(run_copy, tmp_path, capsys, damaged):
    folder = newest(run_copy("bf16"))
    if damaged:
        content = bytearray((folder / OPTIM).read_bytes())
        content[-1] ^= 1
        (folder / OPTIM).write_bytes(content)
    assert run_program(folder, "--out", tmp_path / "out") == (78 if damaged else 0)
    if damaged:
        assert "does not match its SHA-256" in capsys.readouterr().err
    else:
        assert "embed.weight" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("latest", ["../other/global_step4", "ABSOLUTE", "..", ".", "", "global_step4/../../other"])
def test_a_latest_that_leaves_the_folder_is_refused(saved, tmp_path, capsys, latest):
    other = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "other")
    strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    latest = latest.replace("ABSOLUTE", str(other))
    (tmp_path / "plain" / "latest").write_text(latest)
    assert run_program(tmp_path / "plain", "--out", tmp_path / "out") == 78
    assert f"{latest!r} is no name of a folder in" in capsys.readouterr().err
    (tmp_path / "plain" / "latest").write_text("global_step4")
    assert run_program(tmp_path / "plain", "--tag", latest, "--out", tmp_path / "out") == 78
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../../other.pt", "/etc/passwd"])
def test_a_manifest_that_leaves_the_folder_is_refused(run_copy, tmp_path, capsys, name):
    run = run_copy("bf16")
    (tmp_path / "other.pt").write_bytes(b"else")
    manifest = newest(run) / "MANIFEST.json"
    listed = json.loads(manifest.read_text())
    listed["files"].append(listed["files"][0] | {"name": name})
    manifest.write_text(json.dumps(listed))
    assert run_program(run, "--tag", newest(run).name, "--out", tmp_path / "out") == 78
    assert f"{name!r} in MANIFEST.json points outside the folder" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["missing tag", "no name", "tag of a checkpoint itself"])
def test_a_wrong_tag_of_a_plain_folder_is_refused(saved, tmp_path, capsys, case):
    checkpoint = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    folder, tag, message = {
        "missing tag": (tmp_path / "plain", "global_step9", "contains no *_optim_states.pt files"),
        "no name": (tmp_path / "plain", "9" * 256, "is no name of a folder"),
        "tag of a checkpoint itself": (checkpoint, "global_step9", "is one checkpoint itself"),
    }[case]
    assert run_program(folder, "--tag", tag, "--out", tmp_path / "out") == 78
    assert message in capsys.readouterr().err


class ForeignObject:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


class Shell(ForeignObject):
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["in torch's archive", "a bare pickle"])
@pytest.mark.parametrize("kind", [ForeignObject, Shell])
@pytest.mark.parametrize("name", [OPTIM, MODEL])
def test_code_in_a_checkpoint_is_refused_and_not_run(saved, tmp_path, capsys, name, kind, form):
    folder = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    crafted = torch.load(folder / name, weights_only=False) | {"client": kind(tmp_path / "ran")}
    if form == "a bare pickle":
        (folder / name).write_bytes(pickle.dumps({"client": kind(tmp_path / "ran")}, protocol=2))
    else:
        torch.save(crafted, folder / name)
    # It is a working attack on a reader that does not guard itself.
    if form == "a bare pickle":
        pickle.loads((folder / name).read_bytes())
    else:
        torch.load(folder / name, weights_only=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    assert run_program(tmp_path / "plain", "--out", tmp_path / "out") == 78
    assert f"{name}: contains more than tensors and plain data, refused" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


_junk = (
    st.none() | st.booleans() | st.integers(-3, 10**4) | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
)


@st.composite
def changed_file(draw: Any) -> Callable[[bytes], bytes]:
    """A change of a JSON file: another value in it or for it, its end cut off, another encoding, deep nesting."""
    kind, junk, part = (
        draw(st.sampled_from(["value", "all", "cut", "encoding", "deep"])),
        draw(_junk),
        draw(st.floats(0, 1)),
    )
    encoding = draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"]))

    def change(content: bytes) -> bytes:
        listed = json.loads(content)
        if kind == "value" and listed:
            return json.dumps(listed | {sorted(listed)[int(part * (len(listed) - 1))]: junk}).encode()
        if kind == "cut":
            return content[: int(part * len(content))]
        if kind == "deep":
            return b"[" * 100_000
        return content.decode().encode(encoding) if kind == "encoding" else json.dumps(junk).encode()

    return change


EVALUATED = '{"step": 2, "group": "eval", "data": "d", "split": "val", "loss": 1.0}\n'
NAMES = ["model/config.json", "best.json", "MANIFEST.json", "latest", "metrics.jsonl", "metrics.jsonl"]


@settings(max_examples=35, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(NAMES), change=changed_file())
def test_changed_files_of_a_run_are_exported_rightly_or_refused(saved, tmp_path_factory, name, change):
    folder = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    run = Path(shutil.copytree(saved.root / "fp32", folder / "run"))
    write_best(run, BestRecord("step_00000004", 4, "loss", 1.0, "data"))
    (run / "metrics.jsonl").write_text(EVALUATED)
    source, tag = run, ("--tag", "best")
    if name == "latest":
        source, tag = strip_to_plain(newest(run), folder / "plain").parent, ()
        (source / "latest").write_bytes(change(b'{"a": 1}'))
    else:
        path = newest(run) / name if name == "MANIFEST.json" else run / name
        path.write_bytes(change(path.read_bytes()) + (b"\n" + EVALUATED.encode()) * (name == "metrics.jsonl"))
    status = run_program(source, *tag, "--out", folder / "out", "--dtype", "fp32")
    assert status in (0, 78)
    assert (folder / "out").exists() == (status == 0)
    assert not (folder / "out.partial").exists()
    if status == 0:
        assert json.loads((folder / "out" / "export_report.json").read_text())["checkpoint"] == "step_00000004"
        assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "float32"


def open_without_pickle(folder):
    def forbid(event, arguments):
        if event == "pickle.find_class":
            raise RuntimeError("a pickle was opened")

    pickled = pickle.dumps(Counter())
    sys.addaudithook(forbid)
    with pytest.raises(RuntimeError, match="a pickle was opened"):
        pickle.loads(pickled)
    Unimo3ForPreTraining.from_pretrained(folder)


@pytest.mark.integration
def test_the_exported_folder_opens_where_pickle_is_forbidden(saved, tmp_path):
    assert run_program(saved.root / "unimo", "--out", tmp_path / "out", "--max-shard-size", "50KB") == 0
    run_alone(open_without_pickle, tmp_path / "out")


def test_of_two_exports_to_one_folder_the_second_is_refused(run_copy, tmp_path, capsys, monkeypatch):
    run, out, stock, second = run_copy("fp32"), tmp_path / "out", export.export_weights, []

    def export_weights(*arguments, **options):
        if not second:
            second.append(0)
            second[0] = run_program(run, "--out", out)
        return stock(*arguments, **options)

    monkeypatch.setattr(export, "export_weights", export_weights)
    assert run_program(run, "--out", out) == 0
    assert second == [78]
    assert f"{out}: another export writes it; wait for its end, or choose another folder" in capsys.readouterr().err
    assert (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out.")] == []
