"""Saves a run's checkpoints, in the foreground or in a background thread; each is committed atomically or not at all.

A save goes to ``step_00001000.tmp``: every rank writes, flushes and hashes its files; when all have, rank 0 writes
the manifest (name, bytes and SHA-256 of every file), renames the folder, and replaces ``latest``. After each
step the ranks agree: if one failed, all fail, and the staging folder is removed.

In the background, a save blocks the step only while this rank's state is copied to host memory, which later saves
reuse. A thread does the rest and agrees through a separate process group. A second save waits for the first.

Source: DeepSpeed's engine.save_checkpoint for the tensors; databases' commit files for the rename; torchtitan's
asynchronous checkpoints for the copy and the separate group.
"""

import atexit
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unimo3.checkpoint import store
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.engine_files import (
    HostMemory,
    capture_engine_files,
    gather_persistent,
    without_barriers,
    write_captured,
    write_engine_files,
)
from unimo3.checkpoint.manifest import (
    STATE,
    flush_and_hash,
    flush_folder,
    make_readable,
    write_and_flush,
    write_manifest,
)
from unimo3.checkpoint.state import TrainState, capture_rng, describe_engine, save_rng
from unimo3.checkpoint.store import SAVE_FIX
from unimo3.distributed import all_gather_object, on_all_ranks, world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError, UnreachableError

log = logging.getLogger(__name__)

# The slowest rank writes for less than this.
_TIMEOUT = timedelta(hours=12)
# For a running save when the run ends by an error; a node that is gone must not block the others forever.
_EXIT_WAIT_S = 600.0


class Saver:
    """Saves of one run's engine; every rank has one, and all ranks make the same calls.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: the engine's optimizer state is offloaded to NVMe, and saves are to be made in the background.
    """

    def __init__(self, engine: Engine, run: Path, args: CheckpointArgs):
        self._engine = engine
        self._run = run
        self._args = args
        self._memory = HostMemory()
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._committed_step: int | None = None
        self._finished: deque[tuple[int, float]] = deque()  # step and seconds; the thread appends
        self._has_logged_memory = world()[0] != 0  # rank 0 alone logs
        if args.background:
            if getattr(engine.optimizer, "swap_optimizer", False):
                raise CheckpointError(
                    "checkpoint.background: true: copies the optimizer's state to main memory, and the ds_config keeps "
                    "it on NVMe; set it to false, or offload to main memory"
                )
            if dist.is_initialized() and dist.get_world_size() > 1:
                self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            # A run that ends by an error first waits for the checkpoint being written.
            atexit.register(self._join_at_exit)

    @property
    def memory_bytes(self) -> int:
        """Host memory that copies for saves in the background take on this rank."""
        return self._memory.num_bytes

    def take_finished(self) -> list[tuple[int, float]]:
        """Step of each save committed since the last call, and the seconds from its beginning to its commit."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed on this rank and is not raised yet; `wait` raises it."""
        return self._failure is not None

    def save(self, state: TrainState, is_last: bool = False, in_foreground: bool = False) -> None:
        """Save a checkpoint; return when it is committed or, in the background, when training may continue.

        Args:
            is_last: whether the run ends with it: this returns only when it is committed, and it must succeed.
            in_foreground: whether to wait until it is committed, even if saves are made in the background.

        Raises:
            CheckpointError: on every rank; this save failed, or the one before in the background, which `is_last`
                ignores; and ``checkpoint.on_save_error`` is stop.
        """
        try:
            self.wait()
        except CheckpointError as error:
            if not is_last:
                raise
            # The disk may have space again; if this save succeeds, nothing is lost and the run ends as it would have.
            if world()[0] == 0:
                log.error("%s; the last save of the run is attempted anyway", error)
        started = time.perf_counter()
        try:
            finish = begin_save(self._engine, self._run, state, self._memory if self._args.background else None)
        except CheckpointError as error:
            self._failure = error
            self.wait(must_succeed=is_last)
            return

        def finish_save() -> None:
            try:
                folder = finish(self._group)
                self._committed_step = state.step
                self._finished.append((state.step, time.perf_counter() - started))
                self._prune(folder)
            except CheckpointError as error:
                self._failure = error
            except Exception as error:  # such as a process group's error after another rank's process has ended
                self._failure = CheckpointError(f"saving {store.tag_of(state.step)} failed ({error}); {SAVE_FIX}")

        if self._args.background and not self._has_logged_memory:
            log.info(
                "copies for saves in the background take %.0f MB of this host's memory a rank", self.memory_bytes / 1e6
            )
            self._has_logged_memory = True
        if self._args.background and not (is_last or in_foreground):
            self._thread = threading.Thread(target=finish_save, name="checkpoint", daemon=True)
            self._thread.start()
            return
        finish_save()
        self.wait(must_succeed=is_last)

    def ensure(self, state: TrainState, is_last: bool = True) -> bool:
        """Ensure that a state is committed: wait for a save under way, and save if it was of another step.

        Every rank calls it.

        Returns:
            Whether it is committed; always true for the run's last save, which must succeed.

        Raises:
            CheckpointError: on every rank; a save has failed, and it was the last one or ``checkpoint.on_save_error``
                is stop.
        """
        self._join()
        if not all(all_gather_object(self._committed_step == state.step and self._failure is None)):
            self.save(state, is_last, in_foreground=True)
        return all(all_gather_object(self._committed_step == state.step))

    def wait(self, must_succeed: bool = False) -> None:
        """Wait for the save under way and raise the error of one that failed; every rank calls it.

        Args:
            must_succeed: whether a failure is an error whatever ``checkpoint.on_save_error`` is.

        Raises:
            CheckpointError: on every rank; a save has failed.
        """
        self._join()
        local, self._failure = self._failure, None
        # A rank that succeeded does not know of another rank's failure.
        failures = [failure for failure in all_gather_object(str(local) if local else None) if failure]
        if not failures:
            return
        failure = local or CheckpointError(failures[0])
        if must_succeed or self._args.on_save_error == "stop":
            raise failure
        if world()[0] == 0:
            log.error("%s; training continues (checkpoint.on_save_error: warn)", failure)

    def _join_at_exit(self) -> None:
        if self._thread is not None:
            self._thread.join(_EXIT_WAIT_S)
            if self._thread.is_alive() or self._failure is not None:
                log.error(
                    "the background save failed or did not finish in time (%s)", self._failure or f"{_EXIT_WAIT_S:g} s"
                )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _prune(self, folder: Path) -> None:
        if world()[0] != 0:
            return
        try:
            store.prune(self._run, self._args.keep_last, self._args.keep_every, known_good=folder)
        except (OSError, UnreachableError) as error:  # the checkpoint is there, and the next save tries again
            log.warning("%s: old checkpoints could not be removed (%s)", self._run, error)


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
        A function that finishes the save; with `memory` it may run in any thread. It synchronizes the ranks through the
        given process group, and returns the committed folder.

    Raises:
        CheckpointError: on every rank, also by the returned function; earlier checkpoints are untouched.
    """
    rank, _ = world()
    checkpoints, tag = store.folder_of(run), store.tag_of(state.step)
    staging, final = checkpoints / f"{tag}.tmp", checkpoints / tag
    state = replace(state, engine=describe_engine(engine))
    # Each step of the protocol ends in agreement: a failed rank notifies the others instead of leaving them waiting.
    on_all_ranks(f"preparing {staging}", lambda: _clear_staging(staging) if rank == 0 else None, SAVE_FIX)
    rng_state = capture_rng()
    files: list[Path] = []
    if memory is None:
        files = _run_deepspeed_part(engine, staging, f"writing {staging}", lambda: write_engine_files(engine, staging))
    else:
        _run_deepspeed_part(
            engine, staging, f"copying for {staging}", lambda: capture_engine_files(engine, staging, memory)
        )

    def write_files() -> list[Path]:
        written = files if memory is None else write_captured(memory)
        written.append(staging / f"rng_rank_{rank}.safetensors")
        save_rng(written[-1], rng_state)
        make_readable(written[-1])
        if rank == 0:
            written.append(staging / STATE)
            state.write(written[-1])
        return written

    def flush_and_commit(group: Any) -> Path:
        try:
            written = on_all_ranks(f"writing {staging}", write_files, SAVE_FIX, group)
            parts = on_all_ranks(f"flushing {staging}", lambda: flush_and_hash(staging, written[rank]), SAVE_FIX, group)
            on_all_ranks(
                f"committing {final}", lambda: _commit(staging, final, parts) if rank == 0 else None, SAVE_FIX, group
            )
        except CheckpointError:
            _discard(staging, group)
            raise
        return final

    return flush_and_commit


def _run_deepspeed_part(engine: Engine, staging: Path, doing: str, action: Callable[[], Any]) -> Any:
    """This rank's part of DeepSpeed's save, after which all ranks meet; what it returned."""
    try:
        with without_barriers(engine.optimizer):
            return on_all_ranks(doing, action, SAVE_FIX)[world()[0]]
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

    on_all_ranks(f"removing {staging}", remove, SAVE_FIX, group)


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
    previous = final.with_name(f"{final.name}{store.REPLACED}")
    if final.exists():
        final.rename(previous)  # the same step saved again, after resuming from an earlier one
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
    shutil.rmtree(previous, ignore_errors=True)
