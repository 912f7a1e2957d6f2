"""Checkpoints on disk: written whole or not at all, verified before use.

    RUN/checkpoints/step_00001000/   DeepSpeed's files of every rank, rng_rank_*.safetensors, state.json, MANIFEST.json
    RUN/checkpoints/latest           name of the newest one, for people and for DeepSpeed's own tools

A save goes to ``step_00001000.tmp``: every rank writes, flushes and hashes its own files; after a barrier rank 0
writes the manifest (name, bytes and SHA-256 of every file), renames the folder, and replaces ``latest``. A folder
without a valid manifest is no checkpoint. A failure on any rank is agreed on by all, so no rank waits for another.

Source: DeepSpeed's engine.save_checkpoint for the tensors; the rename protocol is that of databases' commit files.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from unimo3.checkpoint.manifest import (
    MANIFEST,
    STATE,
    flush_and_hash,
    flush_folder,
    make_readable,
    verify,
    write_and_flush,
    write_manifest,
)
from unimo3.checkpoint.state import TrainState, load_rng, save_rng
from unimo3.distributed import all_gather_object, broadcast_object, world
from unimo3.errors import CheckpointError

__all__ = ["STATE", "folder_of", "list_checkpoints", "load", "newest_good", "prune", "save", "tag_of", "verify"]

log = logging.getLogger(__name__)

_TAG = re.compile(r"^step_\d{8,}$")


def tag_of(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Optimizer steps that a checkpoint's name tells."""
    return int(folder.name.removeprefix("step_"))


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first; what was never committed is not among them."""
    return [folder for folder in _candidates(run) if (folder / MANIFEST).is_file()]


def save(engine: Any, run: Path, state: TrainState) -> Path:
    """Save and commit a checkpoint; every rank calls it.

    Raises:
        CheckpointError: on every rank, if any rank failed; earlier checkpoints are untouched.
    """
    rank, _ = world()
    checkpoints, tag = folder_of(run), tag_of(state.step)
    staging, final = checkpoints / f"{tag}.tmp", checkpoints / tag
    state = replace(state, engine=describe_engine(engine))
    mend = "earlier checkpoints are untouched; check space, quota and permissions of the run's folder"
    # Each step of the protocol ends in agreement: a rank that failed tells the others instead of leaving them waiting.
    _together(f"preparing {staging}", lambda: _clear_staging(checkpoints) if rank == 0 else None, mend)
    written = _together(f"writing {staging}", lambda: _write(engine, staging, state), mend)
    parts = _together(f"flushing {staging}", lambda: flush_and_hash(staging, written[rank]), mend)
    _together(f"committing {final}", lambda: _commit(staging, final, parts) if rank == 0 else None, mend)
    return final


def describe_engine(engine: Any) -> str:
    """What decides the form of an engine's files, such as ``ZeRO-3 bf16``."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    return f"ZeRO-{engine.zero_optimization_stage()} {precision}"


def load(engine: Any, folder: Path) -> TrainState:
    """Restore engine and generators from a verified checkpoint of any number of ranks; every rank calls it.

    DeepSpeed wants an engine that has not saved before.

    Raises:
        CheckpointError: on every rank; it was written under another ds_config or by another model, or a rank cannot
            read its part.
    """
    rank, size = world()
    mend = "move this checkpoint away to resume from the one before it"
    state: TrainState = _together(f"reading {folder / STATE}", lambda: TrainState.read(folder / STATE), mend)[0]
    if state.engine != describe_engine(engine):
        raise CheckpointError(
            f"{folder}: was written under {state.engine}, training.ds_config now says {describe_engine(engine)}; use a "
            "ds_config of the same stage and precision"
        )

    def restore() -> None:
        if state.world_size == size:
            loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
            if loaded is None:
                raise CheckpointError("DeepSpeed found nothing it could load")
            load_rng(folder / f"rng_rank_{rank}.safetensors")
            return
        from unimo3.checkpoint.elastic import load_elastic  # imports deepspeed

        load_elastic(engine, folder)
        kept = rank % state.world_size
        load_rng(folder / f"rng_rank_{kept}.safetensors", stranger=rank if kept != rank else None)

    _together(f"loading {folder}", restore, mend)
    return state


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; all ranks verify a share and agree.

    A damaged one is named in the log with the reason, left where it is, and the next older is tried.
    """
    rank, size = world()
    # Rank 0's listing holds for all: on a shared file system others may still see an older one.
    for folder in reversed(broadcast_object(_candidates(run))):
        problems = [problem for part in all_gather_object(verify(folder, rank, size)) for problem in part]
        if not problems:
            return folder
        if rank == 0:
            log.warning("%s is damaged and passed over: %s", folder, "; ".join(dict.fromkeys(problems)))
    return None


def prune(run: Path, keep_last: int, keep_every: int, known_good: Path | None = None) -> list[Path]:
    """Remove old checkpoints and return them; the newest good one always stays.

    Args:
        keep_last: newest ones to keep, at least 1.
        keep_every: steps; multiples of it stay. 0: none.
        known_good: a checkpoint that needs no verification here, such as one just saved.
    """
    checkpoints = list_checkpoints(run)
    old = checkpoints[: -max(1, keep_last)]
    removable = [folder for folder in old if not (keep_every and step_of(folder) % keep_every == 0)]
    kept = [folder for folder in checkpoints if folder not in removable]
    if removable and not any(folder == known_good or not verify(folder) for folder in reversed(kept)):
        last_good = next((folder for folder in reversed(removable) if not verify(folder)), None)
        log.warning("%s: none of the checkpoints to keep is good; %s stays", run, last_good or "nothing good")
        removable = [folder for folder in removable if folder != last_good]
    for folder in removable:
        _remove(folder)
    return removable


def _candidates(run: Path) -> list[Path]:
    """Folders that are named as checkpoints, oldest first."""
    folder = folder_of(run)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _TAG.match(path.name) and path.is_dir()), key=step_of)


def _together(doing: str, action: Callable[[], Any], mend: str) -> list[Any]:
    """Run `action` on every rank; return all results, or raise on every rank if it failed on any."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # whatever it was, the other ranks must hear of it
        failure = f"{type(error).__name__}: {error}"
    outcomes = all_gather_object((result, failure))
    failures = [f"rank {rank}: {failed}" for rank, (_, failed) in enumerate(outcomes) if failed]
    if failures:
        more = f"; and {len(failures) - 4} more ranks" if len(failures) > 4 else ""
        raise CheckpointError(f"{doing} failed ({'; '.join(failures[:4])}{more}); {mend}")
    return [outcome for outcome, _ in outcomes]


def _clear_staging(checkpoints: Path) -> None:
    """Remove what killed saves and removals left."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in checkpoints.glob("step_*.tmp"):
        shutil.rmtree(path)


def _remove(folder: Path) -> None:
    # Renamed first, so that a kill half way leaves nothing that passes for a checkpoint.
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _write(engine: Any, staging: Path, state: TrainState) -> list[Path]:
    """Write this rank's files and return them."""
    from unimo3.checkpoint.writing import write_engine_files  # imports deepspeed: seconds that listing need not wait

    rank, _ = world()
    written = write_engine_files(engine, staging)
    written.append(staging / f"rng_rank_{rank}.safetensors")
    save_rng(written[-1])
    make_readable(written[-1])
    if rank == 0:
        written.append(staging / STATE)
        state.write(written[-1])
    return written


def _commit(staging: Path, final: Path, parts: list[list[dict[str, Any]]]) -> None:
    entries = [entry for part in parts for entry in part]
    on_disk = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
    listed = {entry["name"] for entry in entries}
    if on_disk != listed:
        raise OSError(f"{staging}: files appeared or vanished during the save: {sorted(on_disk ^ listed)}")
    write_manifest(staging, entries)
    replaced = final.with_name(f"{final.name}.old.tmp")
    if final.exists():
        final.rename(replaced)  # the same step saved again, after resuming from an earlier one
    staging.rename(final)
    latest = final.parent / "latest"
    write_and_flush(latest.with_suffix(".tmp"), final.name)
    latest.with_suffix(".tmp").replace(latest)
    flush_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
