"""Sharded ZeRO checkpoint -> a folder of safetensors that ``from_pretrained`` loads.

    OUT/model.safetensors            or model-00001-of-00003.safetensors ... and model.safetensors.index.json
    OUT/export_report.json           what became of each tensor, and the SHA-256 of the other files
    OUT/README.md                    the model card, which users complete: the report has no SHA-256 of it
    OUT/config.json, tokenizer, ...  the files of RUN/model, answers.json among them in VQA

Values that the target type cannot represent are an error that names the tensors, unless the caller chooses otherwise.
Tied weights are written once; the model ties them again when it loads. The files are read back before the folder gets
its name. Nothing in it is a pickle.

Source: transformers' layout of a model's folder.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from unimo3.checkpoint.casting import OnOverflow, TensorReport
from unimo3.checkpoint.manifest import STATE, flush_folder, make_readable, sha256_of
from unimo3.checkpoint.model_card import write_card
from unimo3.checkpoint.state import TrainState
from unimo3.checkpoint.torch_file import close_files
from unimo3.checkpoint.weights import INDEX, Options, default_jobs, verify_layout, write_weights
from unimo3.checkpoint.zero_reader import ZeroCheckpoint
from unimo3.dtypes import dtype_of
from unimo3.errors import CheckpointError

REPORT = "export_report.json"
# An engine trains a task whose `model` attribute is what users load.
_PREFIX = "model."
_FACTS = ("dataset", "split", "samples", "weight", "fingerprint")
_NUM_ERRORS_SHOWN = 10


def export_run(
    run: Path | None,
    checkpoint: Path,
    out: Path,
    dtype: str,
    on_overflow: OnOverflow,
    max_file_bytes: int,
    *,
    num_jobs: int | None = None,
    verify: bool = True,
) -> list[TensorReport]:
    """Write the folder `out` atomically: it appears by a rename when it is complete.

    Args:
        run: gives the model's configuration, tokenizer and image processor. None: of a checkpoint that this project
            did not write, or that came without its run, only weights, index and report are written.
        checkpoint: a verified one.
        out: must not exist, or be empty.
        dtype: see `export_weights`; so for all that follow.

    Raises:
        CheckpointError: see `export_weights` and `copy_model_files`; or the folder cannot be written.
    """
    out = out.resolve()
    staging = out.with_name(out.name + ".partial")
    try:
        with _only_export_to(out, staging):
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir(parents=True)
            try:
                if run is not None:
                    copy_model_files(run, staging)
                reports = export_weights(
                    checkpoint, staging, dtype, on_overflow, max_file_bytes, num_jobs=num_jobs, verify=verify
                )
                if run is not None:
                    # Weights left in float32 would overflow again if from_pretrained cast them to the half type.
                    has_fp32 = any(report.num_over_range and report.dtype == "float32" for report in reports)
                    _set_config_dtype(staging / "config.json", torch.float32 if has_fp32 else dtype_of(dtype))
                    _record_files(staging, checkpoint)
                    write_card(run, checkpoint, staging, dtype, reports)
                _flush(staging)
                staging.rename(out)
            except BaseException:
                shutil.rmtree(staging)
                raise
        flush_folder(out.parent)
    except (OSError, CheckpointError) as error:
        if not checkpoint.exists():
            raise CheckpointError(
                f"{checkpoint}: was removed during the export, as a training run does with old ones; export a newer "
                "one, or keep some with checkpoint.keep_every"
            ) from error
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{out}: the export failed and left nothing ({error}); check space, quota and permissions"
        ) from error
    return reports


@contextmanager
def _only_export_to(out: Path, staging: Path) -> Iterator[None]:
    """While in it, no other process exports to the same folder.

    Raises:
        CheckpointError: another process does.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{staging}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{out}: another export writes it; wait for its end, or choose another folder") from error
    try:
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(f"{out}: another export has written it; choose another folder")
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def export_weights(
    checkpoint: Path,
    out: Path,
    dtype: str,
    on_overflow: OnOverflow,
    max_file_bytes: int,
    *,
    num_jobs: int | None = None,
    verify: bool = True,
) -> list[TensorReport]:
    """Write a checkpoint's weights and their report into the folder `out`; after an error none of them is left.

    Names lose the ``model.`` that a run of this project has before them; other checkpoints' names stay as they are.

    Args:
        dtype: of floating-point tensors: one of `unimo3.dtypes.DTYPES`.
        on_overflow: what to do with values beyond the type's largest (fp16: 65504): refuse, clamp, or keep that
            tensor in float32.
        max_file_bytes: limit of a file's size, unless one tensor is larger.
        num_jobs: tensors processed at a time; it changes time and memory, not the result. None: by the cores.
        verify: read the files back and compare.

    Raises:
        CheckpointError: tensors have values that are not finite, or that the target type cannot represent; or the
            files that were read back differ from what was written.
    """
    source = ZeroCheckpoint(checkpoint)
    names = {name: _public(source, name) for name in source.names()}
    options = Options(dtype_of(dtype), on_overflow, max_file_bytes, num_jobs or default_jobs(), is_read_back=verify)
    try:
        reports, errors = write_weights(source, names, out, options)
        if errors:
            more = f"\n  and {len(errors) - _NUM_ERRORS_SHOWN} more" if len(errors) > _NUM_ERRORS_SHOWN else ""
            raise CheckpointError(
                f"{checkpoint}: {len(errors)} tensors cannot be exported as {dtype}:\n  "
                + "\n  ".join(errors[:_NUM_ERRORS_SHOWN])
                + more
            )
        if verify:
            verify_layout(out, reports)
        described = {
            "checkpoint": checkpoint.name,
            "dtype": dtype,
            "on_overflow": on_overflow,
            "tied": {_public(source, alias): _public(source, name) for alias, name in source.tied.items()},
            "tensors": [asdict(report) for report in reports],
        }
        (out / REPORT).write_text(json.dumps(described, indent=1) + "\n")
    except BaseException:
        for path in (*out.glob("*.safetensors"), out / INDEX, out / REPORT):
            path.unlink(missing_ok=True)
        raise
    finally:
        close_files()
    return reports


def changed_files(folder: str) -> list[str]:
    """Return which files next to an export's weights are not those that it was written with, one line each.

    The files decide what the weights compute: heads of another number fit the same tensors, and so do answers in
    another order. A folder whose report lists no files, or without one as ``save_pretrained`` writes, is not checked.
    """
    root = Path(folder)
    if not (root / REPORT).is_file():
        return []
    try:
        listed = json.loads((root / REPORT).read_bytes()).get("files", {}).items()
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        return [f"'{folder}': its {REPORT} cannot be read ({type(error).__name__}); export the run again"]
    files = _other_files(root)
    return [
        f"'{folder}': its {name} is {'missing' if name not in files else 'not the one that was exported'}; copy it "
        f"again or export the run again, or remove {REPORT} if it was changed on purpose"
        for name, sha256 in listed
        if name not in files or sha256_of(files[name]) != sha256
    ]


def copy_model_files(run: Path, out: Path) -> None:
    """Copy configuration, tokenizer and image processor, and the list of answers where there is one.

    Raises:
        CheckpointError: the run has no configuration.
    """
    if not (run / "model" / "config.json").is_file():
        raise CheckpointError(f"{run / 'model'}: has no config.json; is {run} the folder of a run?")
    shutil.copytree(run / "model", out, copy_function=shutil.copyfile, dirs_exist_ok=True)


def _public(source: ZeroCheckpoint, name: str) -> str:
    """A tensor's name as users see it."""
    if not (source.folder / STATE).is_file():
        return name  # another program's model, whose names may begin with "model."
    if not name.startswith(_PREFIX):
        raise CheckpointError(
            f"{source.folder}: {name}: is not part of the model (no '{_PREFIX}' before it); was this run made by "
            "python -m pretrain.train?"
        )
    return name.removeprefix(_PREFIX)


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__} where an object is expected")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"RUN/model/{path.name}: is no configuration ({error}); copy it from another export of the run"
        ) from error
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _other_files(folder: Path) -> dict[str, Path]:
    """The files next to the weights and the report, by their names in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {path.relative_to(folder).as_posix(): path for path in paths if path.name != REPORT}


def data_of(folder: str) -> list[dict[str, Any]]:
    """The data sources of the run that an exported folder is of, as `DataArgs.facts` gives them; none: no record."""
    try:
        data = json.loads((Path(folder) / REPORT).read_bytes())["data"]
        return [{name: source[name] for name in _FACTS} for source in data]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _record_files(folder: Path, checkpoint: Path) -> None:
    """Add the run's data sources, and the SHA-256 of the files next to the weights, to the report."""
    report = json.loads((folder / REPORT).read_text())
    report["data"] = TrainState.read(checkpoint / STATE).extra.get("data", [])
    report["files"] = {name: sha256_of(path) for name, path in _other_files(folder).items()}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def _flush(folder: Path) -> None:
    """Force all files to disk, readable as the user's umask allows."""
    for path in folder.rglob("*"):
        if path.is_file():
            make_readable(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)
