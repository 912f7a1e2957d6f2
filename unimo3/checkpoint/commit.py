"""The protocol of a save: a checkpoint is committed atomically.

A save goes to ``step_00001000.tmp``: every rank writes, flushes and hashes its files; when all have, rank 0 writes
the manifest (name, bytes and SHA-256 of every file), renames the folder, and replaces ``latest``. Each step ends in
agreement: what fails on one rank fails on all, and is removed.

Source: DeepSpeed's engine.save_checkpoint for the tensors; the rename protocol is that of databases' commit files.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from unimo3.checkpoint import store
from unimo3.checkpoint.engine_files import (
    HostMemory,
    capture_engine_files,
    gather_persistent,
    without_barriers,
    write_captured,
    write_engine_files,
)
from unimo3.checkpoint.load import describe_engine
from unimo3.checkpoint.manifest import (
    STATE,
    flush_and_hash,
    flush_folder,
    make_readable,
    write_and_flush,
    write_manifest,
)
from unimo3.checkpoint.state import TrainState, captured_rng, save_rng
from unimo3.distributed import on_all_ranks, world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError

log = logging.getLogger(__name__)

FIX = "earlier checkpoints are untouched; check space, quota and permissions of the run's folder"


def save(engine: Engine, run: Path, state: TrainState) -> Path:
    """Save and commit a checkpoint; every rank calls it.

    Raises:
        CheckpointError: on every rank, if any rank failed; earlier checkpoints are untouched.
    """
    return begin_save(engine, run, state, None)(None)


def begin_save(engine: Engine, run: Path, state: TrainState, memory: HostMemory | None) -> Callable[[Any], Path]:
    """Run the part of a save that training waits for; every rank calls it.

    Args:
        memory: host memory for the copy that a background save writes later. None: the files are written now.

    Returns:
        A function that finishes the save, in any thread if there is a copy. It synchronizes the ranks through the given
        process group, and returns the committed folder.

    Raises:
        CheckpointError: on every rank, as that function does; earlier checkpoints are untouched.
    """
    rank, _ = world()
    checkpoints, tag = store.folder_of(run), store.tag_of(state.step)
    staging, final = checkpoints / f"{tag}.tmp", checkpoints / tag
    state = replace(state, engine=describe_engine(engine))
    # Each step of the protocol ends in agreement: a failed rank notifies the others instead of leaving them waiting.
    on_all_ranks(f"preparing {staging}", lambda: _clear_staging(staging) if rank == 0 else None, FIX)
    generators = captured_rng()
    if memory is None:
        files: list[Path] = _without_barriers(
            engine, staging, f"writing {staging}", lambda: write_engine_files(engine, staging)
        )

        def write() -> list[Path]:
            return files
    else:
        host_memory = memory

        def capture() -> None:
            capture_engine_files(engine, staging, host_memory)

        _without_barriers(engine, staging, f"copying for {staging}", capture)

        def write() -> list[Path]:
            return write_captured(host_memory)

    def write_all() -> list[Path]:
        written = write()
        written.append(staging / f"rng_rank_{rank}.safetensors")
        save_rng(written[-1], generators)
        make_readable(written[-1])
        if rank == 0:
            written.append(staging / STATE)
            state.write(written[-1])
        return written

    def finish(group: Any) -> Path:
        try:
            written = on_all_ranks(f"writing {staging}", write_all, FIX, group)
            parts = on_all_ranks(f"flushing {staging}", lambda: flush_and_hash(staging, written[rank]), FIX, group)
            on_all_ranks(
                f"committing {final}", lambda: _commit(staging, final, parts) if rank == 0 else None, FIX, group
            )
        except CheckpointError:
            _discard(staging, group)
            raise
        return final

    return finish


def _without_barriers(engine: Engine, staging: Path, doing: str, action: Callable[[], Any]) -> Any:
    """This rank's part of DeepSpeed's save, after which all ranks meet; what it returned."""
    try:
        with without_barriers(engine.optimizer):
            return on_all_ranks(doing, action, FIX)[world()[0]]
    except CheckpointError:
        _discard(staging, None)
        raise
    finally:
        gather_persistent(engine.optimizer)


def _discard(staging: Path, group: Any) -> None:
    """Remove the files of a failed save, to free the disk; no rank returns before they are gone."""

    def remove() -> None:
        if world()[0] == 0:
            shutil.rmtree(staging, ignore_errors=True)

    on_all_ranks(f"removing {staging}", remove, FIX, group)


def _clear_staging(staging: Path) -> None:
    """Make an empty folder for a save, and remove the leftovers of killed saves and removals."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        shutil.rmtree(staging)
    store.restore_replaced(staging.parents[1])
    for path in staging.parent.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)  # another process may still read from it
    staging.mkdir()


def _commit(staging: Path, final: Path, parts: list[list[dict[str, Any]]]) -> None:
    entries = [entry for part in parts for entry in part]
    on_disk = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
    listed = {entry["name"] for entry in entries}
    if on_disk != listed:
        raise OSError(f"{staging}: files appeared or vanished during the save: {sorted(on_disk ^ listed)}")
    write_manifest(staging, entries)
    replaced = final.with_name(f"{final.name}{store.REPLACED}")
    if final.exists():
        final.rename(replaced)  # the same step saved again, after resuming from an earlier one
    try:
        staging.rename(final)
    except OSError:
        store.restore_replaced(final.parents[1])
        raise
    # From here on it is committed, whatever else fails.
    try:
        flush_folder(final.parent)
        latest = final.parent / "latest"
        write_and_flush(latest.with_suffix(".tmp"), final.name)
        latest.with_suffix(".tmp").replace(latest)
        flush_folder(final.parent)
    except OSError as error:
        log.warning("%s is committed, but latest could not be written (%s)", final, error)
    shutil.rmtree(replaced, ignore_errors=True)
