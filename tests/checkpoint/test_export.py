import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pretrain import export as program
from tests.checkpoint.ranks import unimo_output
from unimo3.checkpoint.export import DTYPES, export_weights
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


def report_of(out: Path, name: str) -> dict[str, Any]:
    tensors = json.loads((out / "export_report.json").read_text())["tensors"]
    return next(entry for entry in tensors if entry["name"] == name)


def run_program(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(("run", "dtype"), [("bf16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"), ("zero2", "fp16")])
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


def test_values_out_of_range_are_refused_by_name(run_copy, tmp_path):
    folder = newest(run_copy("bf16"))
    plant(folder, large=1e5, negative=-2e5, fits=65504.0)
    with pytest.raises(CheckpointError, match=r"embed\.weight: 2 of 77 values, up to 200000, exceed 65504"):
        export_weights(folder, tmp_path, "fp16", "error", MB)
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
        (["RUN", "--out", "OUT", "--tag", "step_3"], "there are: step_00000002, step_00000004"),
    ],
)
def test_wrong_arguments_end_with_status_78(saved, tmp_path, capsys, arguments, message):
    places = {"RUN": str(saved.root / "bf16"), "OUT": str(tmp_path / "out")}
    filled = [a.replace("RUN", places["RUN"]).replace("OUT", places["OUT"]) for a in arguments]
    assert run_program(*filled) == 78
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Stranger:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", [OPTIM, MODEL])
def test_code_in_a_checkpoint_is_refused_and_not_run(run_copy, tmp_path, name):
    folder = newest(run_copy("bf16"))
    saved = torch.load(folder / name, weights_only=False)
    torch.save(saved | {"client": Stranger(tmp_path / "ran")}, folder / name)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain data"):
        ZeroCheckpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_a_rank_missing_is_refused(run_copy):
    folder = newest(run_copy("bf16"))
    for path in folder.glob("*zero_pp_rank_1_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="was written by 2 ranks, files of 1 are here"):
        ZeroCheckpoint(folder)


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
