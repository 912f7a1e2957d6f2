"""Saves a run's checkpoints in the foreground or in a background thread, and handles failed saves.

In the background, a save blocks the step only while this rank's state is copied to host memory, which the next save
uses again. A thread does the rest and agrees through a separate process group. A second save waits for the first.

Source: torchtitan's asynchronous checkpoints for the copy and the separate group.
"""

import atexit
import logging
import threading
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unimo3.checkpoint import store
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.commit import FIX, begin_save
from unimo3.checkpoint.engine_files import HostMemory
from unimo3.checkpoint.state import TrainState
from unimo3.distributed import all_gather_object, world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError

log = logging.getLogger(__name__)

# Of the slowest rank's writing.
_TIMEOUT = timedelta(hours=12)
# For a running save when the run ends by an error; a node that is gone must not block the others forever.
_EXIT_WAIT_S = 600.0


class Saver:
    """Saves of one run's engine; every rank has one and calls it alike.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: the engine has values on NVMe and saves are to be made in the background.
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
        self._finished: deque[tuple[int, float]] = deque()  # of the thread
        self._has_logged_memory = world()[0] != 0
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
            in_foreground: whether to wait for it in any case.

        Raises:
            CheckpointError: on every rank; this save failed or, unless it is the last one, the one before, and
                ``checkpoint.on_save_error`` is stop.
        """
        try:
            self.wait()
        except CheckpointError as error:
            if not is_last:
                raise
            # There may be room again; if this save succeeds, nothing is lost and the run ends as it would have.
            if world()[0] == 0:
                log.error("%s; the last save of the run is tried nevertheless", error)
        started = time.perf_counter()
        try:
            finish = begin_save(self._engine, self._run, state, self._memory if self._args.background else None)
        except CheckpointError as error:
            self._failure = error
            self.wait(must_succeed=is_last)
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
                self._failure = CheckpointError(f"saving {store.tag_of(state.step)} failed ({error}); {FIX}")

        if self._args.background and not self._has_logged_memory:
            log.info(
                "copies for saves in the background take %.0f MB of this host's memory a rank", self.memory_bytes / 1e6
            )
            self._has_logged_memory = True
        if self._args.background and not (is_last or in_foreground):
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
            return
        work()
        self.wait(must_succeed=is_last)

    def ensure(self, state: TrainState, is_last: bool = True) -> bool:
        """Ensure that a state is committed: wait for a save under way, and save if it was another; every rank calls it.

        Returns:
            Whether it is committed; always true for the run's last save, which must succeed.

        Raises:
            CheckpointError: on every rank; a save has failed, and it was the last one or ``checkpoint.on_save_error``
                is stop.
        """
        self._wait()
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
        self._wait()
        local, self._failure = self._failure, None
        # A rank whose part succeeded may be the only one that has no record of another's failure.
        failures = [failure for failure in all_gather_object(str(local) if local else None) if failure]
        if not failures:
            return
        failure = local or CheckpointError(failures[0])
        if must_succeed or self._args.on_save_error == "stop":
            raise failure
        if world()[0] == 0:
            log.error("%s; training continues (checkpoint.on_save_error: warn)", failure)

    def _wait_at_exit(self) -> None:
        if self._thread is not None:
            self._thread.join(_EXIT_WAIT_S)
            if self._thread.is_alive() or self._failure is not None:
                log.error(
                    "the save under way failed or did not end in time (%s)", self._failure or f"{_EXIT_WAIT_S:g} s"
                )

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
