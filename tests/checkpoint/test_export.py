"""Exported weights: equal to the gathered ones in every form, checked as they are written, in bounded memory."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.checkpoint_export import measure, shapes_of, write_checkpoint
from tests.checkpoint.exporting import (
    MB,
    MODEL,
    OPTIM,
    contents,
    expected_weights,
    flip,
    newest,
    plant,
    report_of,
    run_program,
    strip_to_plain,
)
from tests.checkpoint.ranks import unimo_output
from unimo3.checkpoint import store, weights
from unimo3.checkpoint.casting import TensorReport
from unimo3.checkpoint.export import export_weights
from unimo3.checkpoint.model_card import write_card
from unimo3.checkpoint.safetensors_writer import SafetensorsWriter, read_header
from unimo3.checkpoint.state import TrainState
from unimo3.checkpoint.zero_reader import ZeroCheckpoint
from unimo3.dtypes import dtype_of
from unimo3.errors import CheckpointError
from unimo3.model.unimo3 import Unimo3ForPreTraining


@pytest.mark.parametrize(
    ("run", "dtype"), [("bf16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"), ("zero2", "fp16"), ("zero1", "fp32")]
)
def test_exported_tensors_equal_the_gathered_ones(saved, tmp_path, run, dtype):
    reports = export_weights(newest(saved.root / run), tmp_path, dtype, "error", MB)
    expected = expected_weights(saved.results[0][run], dtype_of(dtype))
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
            saved.results[0][run]["weights"][f"model.{report.name}"].abs().max().item()
            if expected[report.name].is_floating_point()
            else 0.0
        )


def test_all_ranks_gathered_the_same(saved):
    for name, weight in saved.results[0]["bf16"]["weights"].items():
        torch.testing.assert_close(saved.results[1]["bf16"]["weights"][name], weight, rtol=0, atol=0)


def test_large_weights_are_split_into_files_with_an_index(saved, tmp_path):
    export_weights(newest(saved.root / "fp32"), tmp_path, "fp32", "error", 350)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    exported: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= 350
        assert {index["weight_map"][name] for name in tensors} == {file}
        exported |= tensors
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    expected = expected_weights(saved.results[0]["fp32"], torch.float32)
    assert exported.keys() == expected.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    for name, weight in expected.items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("piece_elements", [1, 5, 12])
def test_pieces_smaller_than_a_tensor_give_the_same_bytes(saved, tmp_path, monkeypatch, piece_elements):
    folders = [tmp_path / "at once", tmp_path / "pieces"]
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


def test_a_size_counts_the_tensors_that_stay_in_float32(run_copy, tmp_path):
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


def test_a_tensor_out_of_range_can_stay_in_float32(run_copy, tmp_path):
    run = run_copy("bf16")
    plant(newest(run), large=1e5)
    out = tmp_path / "out"
    assert run_program(run, "--out", out, "--tag", "step_00000002", "--on-overflow", "keep-fp32") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"

    from unimo3.checkpoint.export import export_run

    mixed = tmp_path / "mixed"
    export_run(run, newest(run), mixed, "fp16", "keep-fp32", MB)
    exported = load_file(mixed / "model.safetensors")
    assert exported["embed.weight"].dtype == torch.float32
    assert exported["embed.weight"].view(-1)[0] == 1e5
    assert exported["inner.weight"].dtype == torch.float16
    # Else from_pretrained would cast the float32 tensor to float16, and 1e5 to infinity.
    assert json.loads((mixed / "config.json").read_text())["dtype"] == "float32"


def test_a_half_precision_value_just_out_of_range_is_detected(run_copy, tmp_path):
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


def test_all_tensors_at_error_are_named(run_copy, tmp_path):
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


def test_a_byte_that_changes_after_writing_is_detected(saved, tmp_path, monkeypatch, capsys):
    def flip_and_read_back(writer: SafetensorsWriter, name: str) -> tuple[str, str]:
        if name == "embed.weight":
            flip(writer.path, read_header(writer.path)[name].start + 70)
        return read_back(writer, name)

    read_back = SafetensorsWriter.read_back
    monkeypatch.setattr(SafetensorsWriter, "read_back", flip_and_read_back)
    assert run_program(saved.root / "bf16", "--out", tmp_path / "out") == 78
    assert "embed.weight in model.safetensors differs from what was written when read back" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    # Not asked to verify, the program calls nothing that could flip it.
    assert run_program(saved.root / "bf16", "--out", tmp_path / "out", "--no-verify") == 0


def test_the_report_has_the_sha256_of_the_files_verified_or_not(saved, tmp_path):
    for verify in (True, False):
        folder = tmp_path / f"{verify}"
        folder.mkdir()
        reports = export_weights(newest(saved.root / "bf16"), folder, "fp16", "error", MB, verify=verify)
        content = (folder / "model.safetensors").read_bytes()
        for name, entry in read_header(folder / "model.safetensors").items():
            expected = hashlib.sha256(content[entry.start : entry.start + entry.num_bytes]).hexdigest()
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
        message = r"missing or unexpected tensors: \['embed.weight'\]"
    elif damage == "swapped index":
        index = tmp_path / weights.INDEX
        index.write_text(index.read_text().replace(first.name, second.name))
        message = "does not give the offsets of the tensors"
    else:
        # The same bytes under another name of their type.
        first.write_bytes(first.read_bytes().replace(b'"F32"', b'"I32"'))
        message = r"embed.weight in .* is torch.int32 \[11, 7\]"
    with pytest.raises(CheckpointError, match=message):
        weights.verify_layout(tmp_path, reports)


@pytest.mark.integration
def test_a_full_disk_leaves_nothing_and_is_reported(saved, tmp_path, capfd):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); "
        "from pretrain.export import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(saved.root / "bf16"), "--out", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 78
    assert "the export failed and left nothing" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
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


@pytest.mark.integration
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
    """Half of each frozen parameter would be uninitialized memory."""
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
    torch.testing.assert_close(unimo_output(model), saved.results[0]["unimo"], rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("name", ["caf\udce9", "half \ud83d", "déjà 犬"])
def test_the_card_names_data_whose_folder_is_no_utf8(run_copy, tmp_path, name):
    run = run_copy("fp32")
    checkpoint = store.list_checkpoints(run)[-1]
    state = TrainState.read(checkpoint / store.STATE)
    facts = {"dataset": name, "split": "train", "samples": 5, "weight": 1.0, "fingerprint": "0" * 64}
    dataclasses.replace(state, extra=state.extra | {"data": [facts]}).write(checkpoint / store.STATE)
    (tmp_path / "config.json").write_text("{}")
    write_card(run, checkpoint, tmp_path, "fp32", [TensorReport("a", [1], "float32", 1.0, 0, 0, "")])
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert shown in (tmp_path / "README.md").read_text(encoding="utf-8")
