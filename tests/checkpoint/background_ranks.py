"""What ranks do in the tests of saves behind the training."""

import resource
import shutil
from pathlib import Path
from typing import Any

from tests.checkpoint.ranks import draw, every_value, start_engine, state_at, train
from tests.waiting import wait_for
from unimo3.checkpoint import store
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.load import load
from unimo3.checkpoint.save import Saver
from unimo3.distributed import barrier, world
from unimo3.errors import CheckpointError


def save_in_background(root: Path) -> dict[str, Any]:
    """Save in the background; return the values at each save, what is committed when, and what failures do."""
    rank, _ = world()
    results: dict[str, Any] = {}
    engine = start_engine(3, bf16=True)
    saver = Saver(engine, root / "good", CheckpointArgs(background=True, keep_last=2))
    train(engine, range(2))
    saver.save(state_at(2))
    results["saved"], results["drawn"] = every_value(engine), draw()
    train(engine, range(2, 4))  # the checkpoint that is being written must not change
    saver.save(state_at(4))  # waits for the first
    results["after the second"] = [folder.name for folder in store.list_checkpoints(root / "good")]
    saver.wait()
    barrier()
    own_files = (root / "good" / "checkpoints" / "step_00000004").glob(f"*zero_pp_rank_{rank}_*")
    results["copies bytes"], results["files bytes"] = saver.memory_bytes, sum(path.stat().st_size for path in own_files)
    results["finished"] = [folder.name for folder in store.list_checkpoints(root / "good")]

    if rank == 0:
        store.prune, prune = (lambda *_, **__: 1 / 0), store.prune
    saver.save(state_at(5))
    try:
        saver.wait()
    except CheckpointError as error:
        results["on rank 0 alone"] = str(error)
    if rank == 0:
        store.prune = prune
    shutil.rmtree(root / "good" / "checkpoints" / "step_00000005", ignore_errors=True)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for on_error in ("stop", "warn"):
        saver = Saver(engine, root / "good", CheckpointArgs(background=True, on_save_error=on_error))
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        saver.save(state_at(6))
        wait_for(lambda saver=saver: saver.has_failed, "the failure of a save")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        try:
            saver.wait()
            results[on_error] = None
        except CheckpointError as error:
            results[on_error] = str(error)
    # After a failure the last save is tried nevertheless; where it succeeds, the run ends well.
    other = Saver(engine, root / "last", CheckpointArgs(background=True))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    other.save(state_at(6))
    wait_for(lambda: other.has_failed, "the failure of a save")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    other.save(state_at(7), is_last=True)
    results["last after a failure"] = [path.name for path in store.list_checkpoints(root / "last")]
    results["remaining"] = [path.name for path in store.list_checkpoints(root / "good")]
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    results["best that failed"] = saver.ensure(state_at(8), is_last=False)
    try:
        saver.save(state_at(8), is_last=True)
    except CheckpointError as error:
        results["last"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results["best"] = saver.ensure(state_at(8), is_last=False)
    results["in the end"] = [path.name for path in store.list_checkpoints(root / "good")]
    return results


def load_good(root: Path) -> dict[str, Any]:
    """Every value of the checkpoint of step 2."""
    engine = start_engine(3, bf16=True, seed=5)
    load(engine, store.folder_of(root / "good") / "step_00000002")
    return every_value(engine)
