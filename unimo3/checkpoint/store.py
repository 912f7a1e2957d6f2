"""Checkpoints on disk: written whole or not at all, verified before use.

    RUN/checkpoints/step_00001000/   DeepSpeed's files of every rank, rng_rank_*.safetensors, state.json, MANIFEST.json
    RUN/checkpoints/latest           name of the newest one, for people and for DeepSpeed's own tools

A save goes to ``step_00001000.tmp``: every rank writes, flushes and hashes its own files; after a barrier rank 0
writes the manifest (name, bytes and SHA-256 of every file), renames the folder, and replaces ``latest``. A folder
without a valid manifest is no checkpoint. A failure on any rank is agreed on by all, so no rank waits for another.

Source: DeepSpeed's engine.save_checkpoint for the tensors; the rename protocol is that of databases' commit files.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from unimo3.checkpoint.state import TrainState, load_rng, save_rng
from unimo3.distributed import all_gather_object, world
from unimo3.errors import CheckpointError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
STATE = "state.json"
_TAG = re.compile(r"^step_\d{8,}$")
_RANK = re.compile(r"_rank_(\d+)[._]")


def tag_of(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first; what was never committed is not among them."""
    folder = folder_of(run)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _TAG.match(path.name) and (path / MANIFEST).is_file())


def save(engine: Any, run: Path, state: TrainState) -> Path:
    """Save and commit a checkpoint; every rank calls it.

    Raises:
        CheckpointError: on every rank, if any rank failed; earlier checkpoints are untouched.
    """
    rank, _ = world()
    checkpoints, tag = folder_of(run), tag_of(state.step)
    staging, final = checkpoints / f"{tag}.tmp", checkpoints / tag
    # Each step of the protocol ends in agreement: a rank that failed tells the others instead of leaving them waiting.
    _together("prepare", lambda: _clear_staging(checkpoints) if rank == 0 else None)
    _together("write", lambda: _write(engine, checkpoints, staging, state))
    parts = _together("flush", lambda: _flush_and_hash(_own_files(staging)))
    _together("commit", lambda: _commit(staging, final, parts) if rank == 0 else None)
    return final


def load(engine: Any, folder: Path) -> TrainState:
    """Restore engine and generators from a verified checkpoint; every rank calls it.

    Raises:
        CheckpointError: it was written by another number of ranks, or DeepSpeed cannot read it.
    """
    rank, size = world()
    state = TrainState.read(folder / STATE)
    if state.world_size != size:
        raise CheckpointError(
            f"{folder}: was written by {state.world_size} ranks, this run has {size}; start it with {state.world_size} "
            "ranks (resuming at another number is not served yet)"
        )
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed could not load it; see its message above")
    load_rng(folder / f"rng_rank_{rank}.safetensors")
    return state


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; all ranks verify a share and agree.

    A damaged one is named in the log with the reason, left where it is, and the next older is tried.
    """
    rank, size = world()
    # Rank 0's listing holds for all: on a shared file system others may still see an older one.
    for folder in reversed(all_gather_object(list_checkpoints(run))[0]):
        problems = [problem for part in all_gather_object(verify(folder, rank, size)) for problem in part]
        if not problems:
            return folder
        if rank == 0:
            log.warning("%s is damaged and passed over: %s", folder, "; ".join(problems))
    return None


def verify(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """Compare a checkpoint's files with its manifest; every `num_parts`-th file from `part` on.

    Returns:
        One line a problem; none if all is well.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
        names = [entry["name"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    if STATE not in names:
        return [f"{MANIFEST} does not list {STATE}"]
    problems = []
    for entry in entries[part::num_parts]:
        name = entry["name"]
        if Path(name).name != name:
            problems.append(f"{name!r} in {MANIFEST} is not a plain file name")
            continue
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        elif _sha256(path) != entry["sha256"]:
            problems.append(f"{name} has another content than was written")
    return problems


def prune(run: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove old checkpoints and return them.

    Args:
        keep_last: newest ones to keep, at least 1.
        keep_every: steps; multiples of it stay. 0: none.
    """
    checkpoints = list_checkpoints(run)
    removed = []
    for folder in checkpoints[: -max(1, keep_last)]:
        step = int(folder.name.removeprefix("step_"))
        if keep_every and step % keep_every == 0:
            continue
        # Without its manifest it is no checkpoint any more, so a kill half way leaves nothing that passes for one.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
        removed.append(folder)
    return removed


def _together(stage: str, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank; return all results, or raise on every rank if it failed on any."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # whatever it was, the other ranks must hear of it
        failure = f"{type(error).__name__}: {error}"
    outcomes = all_gather_object((result, failure))
    failures = [f"rank {rank}: {failed}" for rank, (_, failed) in enumerate(outcomes) if failed]
    if failures:
        raise CheckpointError(
            f"saving failed while ranks {stage} ({'; '.join(failures[:4])}); earlier checkpoints are untouched. Check "
            "space, quota and permissions of the run's folder"
        )
    return [outcome for outcome, _ in outcomes]


def _clear_staging(checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in checkpoints.glob("step_*"):
        if path.is_dir() and not (path / MANIFEST).is_file():
            shutil.rmtree(path)  # left by a save or a removal that was killed
    for path in checkpoints.glob("step_*.tmp"):
        shutil.rmtree(path)


class _DeferringCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's writer of files, with failures kept until all ranks are past DeepSpeed's own barriers."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # the form that torch can map into memory; export relies on it
        self.failure: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.failure = error


def _write(engine: Any, checkpoints: Path, staging: Path, state: TrainState) -> None:
    rank, _ = world()
    stock, engine.checkpoint_engine = engine.checkpoint_engine, _DeferringCheckpointEngine()
    try:
        engine.save_checkpoint(str(checkpoints), tag=staging.name, save_latest=False)
        if engine.checkpoint_engine.failure is not None:
            raise engine.checkpoint_engine.failure
    finally:
        engine.checkpoint_engine = stock
    save_rng(staging / f"rng_rank_{rank}.safetensors")
    if rank == 0:
        state.write(staging / STATE)


def _own_files(staging: Path) -> list[Path]:
    """Files this rank wrote: those with its number in their name; rank 0 also has those with none."""
    rank, _ = world()
    own = []
    for path in sorted(staging.iterdir()):
        number = _RANK.search(path.name.replace("mp_rank_", "mp_"))
        if (int(number[1]) if number else 0) == rank:
            own.append(path)
    return own


def _flush_and_hash(paths: list[Path]) -> list[dict[str, Any]]:
    entries = []
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries.append({"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)})
    return entries


def _commit(staging: Path, final: Path, parts: list[list[dict[str, Any]]]) -> None:
    entries = sorted((entry for part in parts for entry in part), key=lambda entry: entry["name"])
    on_disk = {path.name for path in staging.iterdir()}
    assert on_disk == {entry["name"] for entry in entries}, "every file belongs to exactly one rank"
    _write_and_flush(staging / MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")
    _flush_folder(staging)
    if final.exists():
        shutil.rmtree(final)  # the same step saved again, after resuming from an earlier one
    staging.rename(final)
    latest = final.parent / "latest"
    _write_and_flush(latest.with_suffix(".tmp"), final.name)
    latest.with_suffix(".tmp").replace(latest)
    _flush_folder(final.parent)


def _write_and_flush(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
