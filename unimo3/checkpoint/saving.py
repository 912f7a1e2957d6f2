"""Saves: a checkpoint is committed whole or not at all, at once or behind the training.

A save goes to ``step_00001000.tmp``: every rank writes, flushes and hashes its own files; after a barrier rank 0
writes the manifest (name, bytes and SHA-256 of every file), renames the folder, and replaces ``latest``. A failure on
any rank is agreed on by all.

In the background the step is held only while this rank's state is copied to host memory, which is kept for the next
save; a thread does the rest and agrees through a process group of its own. A second save waits for the first.

Source: DeepSpeed's engine.save_checkpoint for the tensors; the rename protocol is that of databases' commit files;
torchtitan's asynchronous checkpoints for the copy and the own group.
"""

import atexit
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unimo3.checkpoint import store
from unimo3.checkpoint.agree import together
from unimo3.checkpoint.apart import apart, gather_persistent
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.manifest import (
    STATE,
    flush_and_hash,
    flush_folder,
    make_readable,
    write_and_flush,
    write_manifest,
)
from unimo3.checkpoint.state import TrainState, captured_rng, save_rng
from unimo3.checkpoint.writing import HostMemory, capture_engine_files, write_captured, write_engine_files
from unimo3.distributed import all_gather_object, world
from unimo3.errors import CheckpointError

log = logging.getLogger(__name__)

_MEND = "earlier checkpoints are untouched; check space, quota and permissions of the run's folder"
# Of the slowest rank's writing.
_TIMEOUT = timedelta(hours=12)
# For a save under way when the run ends by an error; a node that is gone must not hold the others for ever.
_EXIT_WAIT_S = 600.0


class Saver:
    """Saves of one run's engine; every rank has one and calls it alike.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: the engine keeps values on NVMe and saves are to be made in the background.
    """

    def __init__(self, engine: Any, run: Path, args: CheckpointArgs):
        self._engine = engine
        self._run = run
        self._args = args
        self._memory = HostMemory()
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._committed_step: int | None = None
        self._finished: list[tuple[int, float]] = []
        self._has_told = world()[0] != 0
        if args.background:
            if getattr(engine.optimizer, "swap_optimizer", False):
                raise CheckpointError(
                    "checkpoint.background: true: values on NVMe are copied file by file while training waits; set it "
                    "to false, or offload to the CPU's memory"
                )
            if dist.is_initialized() and dist.get_world_size() > 1:
                self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            # A run that ends by an error does not throw away the checkpoint it was writing.
            atexit.register(self._wait_at_exit)

    @property
    def kept_bytes(self) -> int:
        """Host memory that copies for saves in the background take on this rank."""
        return self._memory.num_bytes

    def take_finished(self) -> list[tuple[int, float]]:
        """Step of each save committed since the last call, and the seconds from its beginning to its commit."""
        finished, self._finished = self._finished, []
        return finished

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed on this rank and nobody was told; `settle` tells."""
        return self._failure is not None

    def save(self, state: TrainState, is_last: bool = False) -> None:
        """Save a checkpoint; return when it is committed or, in the background, when training may go on.

        Args:
            is_last: whether the run ends with it: then it is waited for, and must hold.

        Raises:
            CheckpointError: on every rank; this save or the one before failed, and it was the last one or
                ``checkpoint.on_save_error`` says stop.
        """
        before: CheckpointError | None = None
        try:
            self.settle()
        except CheckpointError as error:
            if not is_last:
                raise
            before = error  # there may be room again: the last save is tried all the same
        started = time.perf_counter()
        try:
            finish = _prepare(self._engine, self._run, state, self._memory if self._args.background else None)
        except CheckpointError as error:
            self._failure = error
            self.settle(must_hold=is_last)
            return

        def work() -> None:
            try:
                folder = finish(self._group)
                self._committed_step = state.step
                self._finished.append((state.step, time.perf_counter() - started))
                self._prune(folder)
            except CheckpointError as error:
                self._failure = error
            except Exception as error:  # such as of the group, when another rank's process has ended
                self._failure = CheckpointError(f"saving {store.tag_of(state.step)} failed ({error}); {_MEND}")

        if self._args.background and not self._has_told:
            log.info(
                "copies for saves in the background keep %.0f MB of this host's memory a rank", self.kept_bytes / 1e6
            )
            self._has_told = True
        if self._args.background and not is_last:
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
            return
        work()
        self.settle(must_hold=is_last)
        if before is not None:
            raise before

    def ensure(self, state: TrainState) -> None:
        """Have a state saved when this returns, now or by a save that is done or under way; every rank calls it.

        Raises:
            CheckpointError: on every rank; a save has failed.
        """
        self._wait()
        if not all(all_gather_object(self._committed_step == state.step and self._failure is None)):
            self.save(state, is_last=True)

    def settle(self, must_hold: bool = False) -> None:
        """Wait for the save under way and tell of one that failed; every rank calls it.

        Args:
            must_hold: whether a failure is an error whatever ``checkpoint.on_save_error`` says.

        Raises:
            CheckpointError: on every rank; a save has failed.
        """
        self._wait()
        own, self._failure = self._failure, None
        # A rank whose own part went well may be the only one that knows nothing of another's failure.
        failures = [failure for failure in all_gather_object(str(own) if own else None) if failure]
        if not failures:
            return
        failure = own or CheckpointError(failures[0])
        if must_hold or self._args.on_save_error == "stop":
            raise failure
        if world()[0] == 0:
            log.error("%s; training goes on (checkpoint.on_save_error: warn)", failure)

    def _wait_at_exit(self) -> None:
        if self._thread is not None:
            self._thread.join(_EXIT_WAIT_S)
            if self._thread.is_alive() or self._failure is not None:
                log.error("the save under way has failed or been given up (%s)", self._failure or "no end in sight")

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _prune(self, folder: Path) -> None:
        if world()[0] != 0:
            return
        try:
            store.prune(self._run, self._args.keep_last, self._args.keep_every, known_good=folder)
        except OSError as error:  # the checkpoint itself is there, and the next save tries again
            log.warning("%s: old checkpoints could not be removed (%s)", self._run, error)


def save(engine: Any, run: Path, state: TrainState) -> Path:
    """Save and commit a checkpoint; every rank calls it.

    Raises:
        CheckpointError: on every rank, if any rank failed; earlier checkpoints are untouched.
    """
    return _prepare(engine, run, state, None)(None)


def _prepare(engine: Any, run: Path, state: TrainState, memory: HostMemory | None) -> Callable[[Any], Path]:
    """What has to be done before training goes on; returns the rest, which agrees through the group it is given."""
    rank, _ = world()
    checkpoints, tag = store.folder_of(run), store.tag_of(state.step)
    staging, final = checkpoints / f"{tag}.tmp", checkpoints / tag
    state = replace(state, engine=store.describe_engine(engine))
    # Each step of the protocol ends in agreement: a rank that failed tells the others instead of leaving them waiting.
    together(f"preparing {staging}", lambda: _clear_staging(staging) if rank == 0 else None, _MEND)
    generators = captured_rng()
    if memory is None:
        held: list[Path] = _apart(engine, staging, f"writing {staging}", lambda: write_engine_files(engine, staging))

        def write() -> list[Path]:
            return held
    else:
        kept = memory

        def capture() -> None:
            capture_engine_files(engine, staging, kept)

        _apart(engine, staging, f"copying for {staging}", capture)

        def write() -> list[Path]:
            return write_captured(kept)

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
            written = together(f"writing {staging}", write_all, _MEND, group)
            parts = together(f"flushing {staging}", lambda: flush_and_hash(staging, written[rank]), _MEND, group)
            together(f"committing {final}", lambda: _commit(staging, final, parts) if rank == 0 else None, _MEND, group)
        except CheckpointError:
            _discard(staging)
            raise
        return final

    return finish


def _apart(engine: Any, staging: Path, doing: str, action: Callable[[], Any]) -> Any:
    """This rank's part of DeepSpeed's save, after which all ranks meet; what it returned."""
    try:
        with apart(engine.optimizer):
            return together(doing, action, _MEND)[world()[0]]
    except CheckpointError:
        _discard(staging)
        raise
    finally:
        gather_persistent(engine.optimizer)


def _discard(staging: Path) -> None:
    """Remove what a save has left that failed on all ranks: a full disk would stay full."""
    if world()[0] == 0:
        shutil.rmtree(staging, ignore_errors=True)


def _clear_staging(staging: Path) -> None:
    """Make an empty folder for a save, and remove what killed saves and removals left."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        shutil.rmtree(staging)
    for path in staging.parent.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)  # somebody may be at it, or read from it
    staging.mkdir()


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
    try:
        staging.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    # From here on it is committed, whatever else fails.
    try:
        latest = final.parent / "latest"
        write_and_flush(latest.with_suffix(".tmp"), final.name)
        latest.with_suffix(".tmp").replace(latest)
        flush_folder(final.parent)
    except OSError as error:
        log.warning("%s is committed, but latest could not be written (%s)", final, error)
    shutil.rmtree(replaced, ignore_errors=True)
