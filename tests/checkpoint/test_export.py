import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.checkpoint_export import measure, shapes_of, write_checkpoint
from pretrain import export as program
from tests.checkpoint.ranks import unimo_output
from unimo3.checkpoint import weights
from unimo3.checkpoint.export import DTYPES, export_weights
from unimo3.checkpoint.safetensors_writer import SafetensorsWriter, read_header
from unimo3.checkpoint.zero import ZeroCheckpoint
from unimo3.errors import CheckpointError
from unimo3.model.unimo3 import Unimo3ForPreTraining

OPTIM = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"
MB = 10**6


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000004"


def expected_weights(told: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ranks gathered, as it should be written: cast, without the second name of the tied weight."""
    weights = {name.removeprefix("model."): weight for name, weight in told["weights"].items()}
    return {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}


def plant(folder: Path, **values: float) -> None:
    """Overwrite the first trained values of rank 0, which are ``embed.weight``'s."""
    saved = torch.load(folder / OPTIM, weights_only=False)
    first = saved["optimizer_state_dict"]["fp32_flat_groups"][0]
    with torch.no_grad():
        for place, value in enumerate(values.values()):
            first[place] = value
    torch.save(saved, folder / OPTIM)


def flip(path: Path, place: int) -> None:
    """Change a bit of a byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def strip_to_plain(checkpoint: Path, folder: Path, tag: str = "global_step4") -> Path:
    """What DeepSpeed alone would have left: its own files below `folder`, and ``latest``."""
    (folder / tag).mkdir(parents=True)
    for path in checkpoint.glob("*_states.pt"):
        shutil.copyfile(path, folder / tag / path.name)
    (folder / "latest").write_text(tag)
    return folder / tag


def report_of(out: Path, name: str) -> dict[str, Any]:
    tensors = json.loads((out / "export_report.json").read_text())["tensors"]
    return next(entry for entry in tensors if entry["name"] == name)


def run_program(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("run", "dtype"), [("bf16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"), ("zero2", "fp16"), ("zero1", "fp32")]
)
def test_exported_tensors_equal_the_gathered_ones(saved, tmp_path, run, dtype):
    reports = export_weights(newest(saved.root / run), tmp_path, dtype, "error", MB)
    expected = expected_weights(saved.told[0][run], DTYPES[dtype])
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=0)
    assert {"embed.weight", "frozen.weight", "scale", "count", "shift"} <= exported.keys()
    assert "decoder.weight" not in exported
    assert "scratch" not in exported
    assert exported["count"].dtype == torch.int64
    assert json.loads((tmp_path / "export_report.json").read_text())["tied"] == {"decoder.weight": "embed.weight"}
    for report in reports:
        assert report.shape == list(expected[report.name].shape)
        assert report.largest == pytest.approx(
            saved.told[0][run]["weights"][f"model.{report.name}"].abs().max().item()
            if expected[report.name].is_floating_point()
            else 0.0
        )


def test_the_ranks_gathered_alike(saved):
    for name, weight in saved.told[0]["bf16"]["weights"].items():
        torch.testing.assert_close(saved.told[1]["bf16"]["weights"][name], weight, rtol=0, atol=0)


def test_large_weights_are_split_into_files_with_an_index(saved, tmp_path):
    export_weights(newest(saved.root / "fp32"), tmp_path, "fp32", "error", 350)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    found: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= 350
        assert {index["weight_map"][name] for name in tensors} == {file}
        found |= tensors
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    expected = expected_weights(saved.told[0]["fp32"], torch.float32)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("piece_elements", [1, 5, 12])
def test_pieces_smaller_than_a_tensor_give_the_same_bytes(saved, tmp_path, monkeypatch, piece_elements):
    folders = [tmp_path / "whole", tmp_path / "pieces"]
    for folder in folders:
        folder.mkdir()
        export_weights(newest(saved.root / "bf16"), folder, "fp16", "error", MB, num_jobs=1)
        monkeypatch.setattr(weights, "_PIECE_ELEMENTS", piece_elements)
    assert contents(folders[0]) == contents(folders[1])


@pytest.mark.parametrize("on_overflow", ["clamp", "keep-fp32"])
def test_the_number_of_jobs_does_not_change_a_byte(run_copy, tmp_path, on_overflow):
    folder = newest(run_copy("bf16"))
    plant(folder, large=1e5, tiny=1e-9)
    for num_jobs in (1, 2, 5):
        (tmp_path / f"{num_jobs}").mkdir()
        export_weights(folder, tmp_path / f"{num_jobs}", "fp16", on_overflow, 150, num_jobs=num_jobs)
    assert len(list((tmp_path / "1").glob("model-*.safetensors"))) > 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_files_are_byte_for_byte_those_of_the_safetensors_library(run_copy, tmp_path):
    folder = newest(run_copy("bf16"))
    plant(folder, large=1e5)
    # int64, float32 and float16 in one file.
    export_weights(folder, tmp_path, "fp16", "keep-fp32", MB)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_size_counts_the_tensors_that_are_kept_in_float32(run_copy, tmp_path):
    folder = newest(run_copy("bf16"))
    plant(folder, large=1e5)
    # embed.weight takes 308 bytes in float32, the 35 values of inner.weight 70 in float16.
    export_weights(folder, tmp_path, "fp16", "keep-fp32", 320)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert files["embed.weight"] != files["inner.weight"]


def test_values_out_of_range_are_refused_by_name(run_copy, tmp_path):
    folder = newest(run_copy("bf16"))
    plant(folder, large=1e5, negative=-2e5, fits=65504.0)
    (tmp_path / "refused").mkdir()
    with pytest.raises(CheckpointError, match=r"embed\.weight: 2 of 77 values, up to 200000, exceed 65504"):
        export_weights(folder, tmp_path / "refused", "fp16", "error", 100)
    assert list((tmp_path / "refused").iterdir()) == []
    export_weights(folder, tmp_path, "bf16", "error", MB)


def test_values_out_of_range_can_be_clamped(run_copy, tmp_path):
    folder = newest(run_copy("bf16"))
    plant(folder, large=1e5, negative=-2e5, tiny=1e-9)
    export_weights(folder, tmp_path, "fp16", "clamp", MB)
    assert load_file(tmp_path / "model.safetensors")["embed.weight"].view(-1)[:3].tolist() == [65504, -65504, 0]
    report = report_of(tmp_path, "embed.weight")
    assert (report["num_over_range"], report["num_flushed"], report["largest"]) == (2, 1, 2e5)


def test_a_tensor_out_of_range_can_be_kept_in_float32(run_copy, tmp_path):
    run = run_copy("bf16")
    plant(newest(run), large=1e5)
    out = tmp_path / "out"
    assert run_program(run, "--out", out, "--tag", "step_00000002", "--on-overflow", "keep-fp32") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"

    from unimo3.checkpoint.export import export_run

    kept = tmp_path / "kept"
    export_run(run, newest(run), kept, "fp16", "keep-fp32", MB)
    exported = load_file(kept / "model.safetensors")
    assert exported["embed.weight"].dtype == torch.float32
    assert exported["embed.weight"].view(-1)[0] == 1e5
    assert exported["inner.weight"].dtype == torch.float16
    # Else from_pretrained would cast the kept tensor to float16, and 1e5 to infinity.
    assert json.loads((kept / "config.json").read_text())["dtype"] == "float32"


def test_a_half_precision_value_just_out_of_range_is_seen(run_copy, tmp_path):
    # In bfloat16 the limit 65504 itself would round to 65536, and 65536 would pass for fitting.
    folder = newest(run_copy("bf16"))
    saved = torch.load(folder / MODEL, weights_only=False)
    saved["frozen_param_fragments"]["model.frozen.weight"][0] = 65536
    torch.save(saved, folder / MODEL)
    with pytest.raises(CheckpointError, match=r"frozen\.weight: 1 of 35 values, up to 65536, exceed 65504"):
        export_weights(folder, tmp_path, "fp16", "error", MB)
    export_weights(folder, tmp_path, "fp16", "clamp", MB)
    assert load_file(tmp_path / "model.safetensors")["frozen.weight"].view(-1)[0] == 65504


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("on_overflow", ["error", "clamp", "keep-fp32"])
def test_values_that_are_not_finite_are_always_refused(run_copy, tmp_path, value, on_overflow):
    folder = newest(run_copy("bf16"))
    plant(folder, bad=value)
    with pytest.raises(CheckpointError, match=r"embed\.weight: 1 of 77 values are not finite"):
        export_weights(folder, tmp_path, "fp32", on_overflow, MB)


def test_nothing_is_left_of_a_refused_export(run_copy, tmp_path):
    run = run_copy("bf16")
    (run / "model" / "config.json").unlink()
    assert run_program(run, "--out", tmp_path / "out") == 78
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_all_tensors_at_fault_are_named(run_copy, tmp_path):
    folder = newest(run_copy("bf16"))
    saved = torch.load(folder / OPTIM, weights_only=False)
    with torch.no_grad():
        for group in saved["optimizer_state_dict"]["fp32_flat_groups"]:
            group[-3:] = 1e6
            group[0] = float("nan")
    torch.save(saved, folder / OPTIM)
    with pytest.raises(CheckpointError, match="4 tensors cannot be exported as fp16") as error:
        export_weights(folder, tmp_path, "fp16", "error", MB)
    assert "scale: 1 of 1 values are not finite" in str(error.value)
    assert "embed.weight: 1 of 77 values are not finite" in str(error.value)


def test_a_byte_that_changes_once_it_is_written_is_found(saved, tmp_path, monkeypatch, capsys):
    def flip_and_read_back(writer: SafetensorsWriter, name: str) -> tuple[str, str]:
        if name == "embed.weight":
            flip(writer.path, read_header(writer.path)[name].start + 70)
        return read_back(writer, name)

    read_back = SafetensorsWriter.read_back
    monkeypatch.setattr(SafetensorsWriter, "read_back", flip_and_read_back)
    assert run_program(saved.root / "bf16", "--out", tmp_path / "out") == 78
    assert "embed.weight in model.safetensors was read back otherwise than it was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    # Not asked to verify, the program calls nothing that could flip it.
    assert run_program(saved.root / "bf16", "--out", tmp_path / "out", "--no-verify") == 0


def test_the_report_tells_sha256_of_the_files_bytes_verified_or_not(saved, tmp_path):
    for verify in (True, False):
        folder = tmp_path / f"{verify}"
        folder.mkdir()
        reports = export_weights(newest(saved.root / "bf16"), folder, "fp16", "error", MB, verify=verify)
        content = (folder / "model.safetensors").read_bytes()
        for name, place in read_header(folder / "model.safetensors").items():
            expected = hashlib.sha256(content[place.start : place.start + place.num_bytes]).hexdigest()
            assert next(report.sha256 for report in reports if report.name == name) == expected
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


@pytest.mark.parametrize("damage", ["header", "missing file", "swapped index", "another type"])
def test_verification_opens_files_and_index_and_compares_types(saved, tmp_path, damage):
    reports = export_weights(newest(saved.root / "fp32"), tmp_path, "fp32", "error", 350)
    weights.verify_layout(tmp_path, reports)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    if damage == "header":
        flip(first, 8)
        message = "was not written as it should be"
    elif damage == "missing file":
        first.unlink()
        message = r"missing or too many: \['embed.weight'\]"
    elif damage == "swapped index":
        index = tmp_path / weights.INDEX
        index.write_text(index.read_text().replace(first.name, second.name))
        message = "does not tell where the tensors are"
    else:
        # The same bytes under another name of their type.
        first.write_bytes(first.read_bytes().replace(b'"F32"', b'"I32"'))
        message = r"embed.weight in .* is torch.int32 \[11, 7\]"
    with pytest.raises(CheckpointError, match=message):
        weights.verify_layout(tmp_path, reports)


def test_a_full_disk_leaves_nothing_and_says_so(saved, tmp_path, capfd):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); "
        "from pretrain.export import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(saved.root / "bf16"), "--out", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 78
    assert "the export failed and left nothing" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_weights_model_files_and_answers_and_no_pickle(run_copy, tmp_path, capsys):
    run = run_copy("bf16")
    (run / "model" / "answers.json").write_text('["yes", "no"]')
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left_by_a_killed_export").write_text("half")
    assert run_program(run, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "answers.json", "config.json", "export_report.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == {"model_type": "odd", "dtype": "float16"}
    assert not (tmp_path / "out.partial").exists()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    shown = capsys.readouterr().out
    assert "8 tensors" in shown
    assert "step_00000004 as fp16" in shown


def test_the_newest_good_checkpoint_is_taken_unless_one_is_named(run_copy, tmp_path, capsys):
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
    places = {"RUN": str(saved.root / "bf16"), "OUT": str(tmp_path / "out")}
    filled = [a.replace("RUN", places["RUN"]).replace("OUT", places["OUT"]) for a in arguments]
    assert run_program(*filled) == 78
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["parent", "parent and tag", "folder"])
def test_a_folder_that_deepspeed_alone_wrote_gives_weights_index_and_report(saved, tmp_path, capsys, given):
    checkpoint = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    place = {"parent": [tmp_path / "plain"], "folder": [checkpoint]}.get(
        given, [tmp_path / "plain", "--tag", checkpoint.name]
    )
    if given == "parent and tag":
        (tmp_path / "plain" / "latest").unlink()
        (tmp_path / "plain" / "latest").write_text("elsewhere")
    out = tmp_path / "out"
    assert run_program(*place, "--out", out, "--max-shard-size", "100") == 0
    assert "weights, index and report only" in capsys.readouterr().out
    assert {path.name.split("-")[0] for path in out.iterdir()} == {
        "model", "model.safetensors.index.json", "export_report.json"
    }  # fmt: skip
    exported: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        exported |= load_file(path)
    # Names are another program's own, whatever they begin with.
    expected = saved.told[0]["bf16"]["weights"]
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        wanted = weight.half() if weight.is_floating_point() else weight
        torch.testing.assert_close(exported[name], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_checkpoint_of_a_run_given_alone_is_verified_and_keeps_the_users_names(run_copy, tmp_path, capsys, damaged):
    folder = newest(run_copy("bf16"))
    if damaged:
        content = bytearray((folder / OPTIM).read_bytes())
        content[-1] ^= 1
        (folder / OPTIM).write_bytes(content)
    assert run_program(folder, "--out", tmp_path / "out") == (78 if damaged else 0)
    if damaged:
        assert "has another content than was written" in capsys.readouterr().err
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
    assert f"{name!r} in MANIFEST.json leads out of the folder" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["missing tag", "tag of a checkpoint itself"])
def test_a_wrong_tag_of_a_plain_folder_is_refused(saved, tmp_path, capsys, given):
    checkpoint = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    place, message = {
        "missing tag": (tmp_path / "plain", "holds no *_optim_states.pt files"),
        "tag of a checkpoint itself": (checkpoint, "is one checkpoint itself"),
    }[given]
    assert run_program(place, "--tag", "global_step9", "--out", tmp_path / "out") == 78
    assert message in capsys.readouterr().err


class Stranger:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


class Shell(Stranger):
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["in torch's archive", "a bare pickle"])
@pytest.mark.parametrize("kind", [Stranger, Shell])
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
    assert f"{name}: holds more than tensors and plain data, refused" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_the_exported_folder_opens_where_pickle_is_forbidden(saved, tmp_path):
    assert run_program(saved.root / "unimo", "--out", tmp_path / "out", "--max-shard-size", "50KB") == 0
    code = """
import collections, pickle, sys
from unimo3.model.unimo3 import Unimo3ForPreTraining

def forbid(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError("a pickle was opened")

sys.addaudithook(forbid)
try:
    pickle.loads(pickle.dumps(collections.Counter()))
except RuntimeError:
    Unimo3ForPreTraining.from_pretrained(sys.argv[1])
    print("opened")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "opened" in done.stdout, done.stderr[-2000:]


def test_memory_does_not_grow_with_the_model_and_stays_under_600_mb(tmp_path):
    peaks = []
    for count, size in ((10**6, "1GB"), (10**8, "1GB"), (10**8, "2MB")):
        folder, out = tmp_path / f"{count}", tmp_path / f"out_{len(peaks)}"
        if not folder.exists():
            write_checkpoint(folder, shapes_of(count), moments=False)
        command = [sys.executable, "-m", "pretrain.export", str(folder), "--jobs", "2", "--max-shard-size", size]
        # Some forty files, one after the other: far fewer may be open at a time.
        limited = ["bash", "-c", 'ulimit -n 40; exec "$@"', "limited", *command, "--out", str(out)]
        peaks.append(measure(limited, tmp_path / "output.txt").peak_bytes / 1e6)
    assert len(list(out.glob("*.safetensors"))) > 20
    # The larger model's embedding alone is 206 MB in float32, its one file 200 MB.
    assert max(peaks) < peaks[0] + 60
    assert max(peaks) < 600


def test_export_imports_no_deepspeed_and_no_transformers():
    code = (
        "import sys, pretrain.export; print({'deepspeed', 'transformers', 'timm', 'torchvision'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_checkpoint_with_a_rank_missing_is_refused(run_copy):
    folder = newest(run_copy("bf16"))
    for path in folder.glob("*zero_pp_rank_1_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="was written by 2 ranks, files of 1 are here"):
        ZeroCheckpoint(folder)


def test_a_checkpoint_without_one_ranks_frozen_parameters_is_refused(saved, tmp_path, capsys):
    """Half of each frozen parameter would be whatever memory held before."""
    plain = strip_to_plain(newest(saved.root / "bf16"), tmp_path / "plain")
    (plain / MODEL.replace("pp_rank_0", "pp_rank_1")).unlink()
    assert run_program(plain, "--out", tmp_path / "out") == 78
    assert "ZeRO-3 writes a model file a rank, 1 of 2 are here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_from_pretrained_computes_what_the_engine_computed(saved, tmp_path):
    out = tmp_path / "out"
    assert run_program(saved.root / "unimo", "--out", out, "--dtype", "fp32") == 0
    model, loading = Unimo3ForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.mlm_head.decoder.weight is model.unimo3.text_tower.embeddings.word_embeddings.weight
    torch.testing.assert_close(unimo_output(model), saved.told[0]["unimo"], rtol=1e-6, atol=1e-6)


def test_from_pretrained_loads_split_fp16_weights(saved, tmp_path):
    out = tmp_path / "out"
    assert run_program(saved.root / "unimo", "--out", out, "--max-shard-size", "50KB") == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model = Unimo3ForPreTraining.from_pretrained(out)
    assert model.dtype == torch.float16
    single = tmp_path / "single"
    assert run_program(saved.root / "unimo", "--out", single) == 0
    for name, weight in load_file(single / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
