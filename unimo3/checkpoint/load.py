"""Loads a checkpoint: the newest one whose files all match its manifest.

All ranks choose alike, also where some read a damaged file or an older listing.

Source: DeepSpeed's engine.load_checkpoint for the tensors.
"""

import logging
from pathlib import Path

from unimo3.checkpoint.manifest import STATE, verify
from unimo3.checkpoint.state import TrainState, describe_engine, load_rng
from unimo3.checkpoint.store import folder_of, list_folders
from unimo3.distributed import from_first_rank, on_all_ranks, world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError

log = logging.getLogger(__name__)

_LOOK = "see that every node can read the run's folder"


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint whose files all match its manifest; see `choose`."""
    return choose(run)[0]


def choose(run: Path) -> tuple[Path | None, list[Path]]:
    """The newest good checkpoint and the damaged ones that are newer; each rank verifies a part and all agree.

    A damaged one is named in the log with the reason, and the next older is tried.

    Raises:
        CheckpointError: on every rank; a rank cannot read the folder.
    """
    is_changed = True
    while is_changed:
        is_changed = False
        damaged: list[Path] = []
        for folder in reversed(_listed(run)):
            if not (problems := _problems(folder)):
                return folder, damaged
            # A run that trains meanwhile removes old ones when it has saved a newer one.
            if folder not in _listed(run):
                is_changed = True
                continue
            damaged.append(folder)
            if world()[0] == 0:
                log.warning("%s is damaged and skipped: %s", folder, "; ".join(problems))
    return None, damaged


def load(engine: Engine, folder: Path) -> TrainState:
    """Restore engine and generators from a verified checkpoint of any number of ranks; every rank calls it.

    DeepSpeed wants an engine that has not saved before.

    Raises:
        CheckpointError: on every rank; it was written under another ds_config or by another model, or a rank cannot
            read its part.
    """
    rank, size = world()
    fix = "move this checkpoint away to resume from the one before it"
    state: TrainState = from_first_rank(f"reading {folder / STATE}", lambda: TrainState.read(folder / STATE), fix)
    if state.engine != describe_engine(engine):
        raise CheckpointError(
            f"{folder}: was written under {state.engine}, training.ds_config is now {describe_engine(engine)}; use a "
            "ds_config of the same stage and precision"
        )

    source = None
    if state.world_size != size or engine.zero_nvme_offload_optimizer():
        from unimo3.checkpoint.zero_reader import ZeroCheckpoint  # imports torch

        source = ZeroCheckpoint(folder, over_ranks=True)

    def restore() -> None:
        if source is None:
            loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
            if loaded is None:
                raise CheckpointError("DeepSpeed found nothing it could load")
            load_rng(folder / f"rng_rank_{rank}.safetensors")
            return
        from unimo3.checkpoint.elastic import load_elastic  # imports deepspeed

        load_elastic(engine, source)
        saved_rank = rank % state.world_size
        load_rng(folder / f"rng_rank_{saved_rank}.safetensors", new_rank=rank if saved_rank != rank else None)

    from unimo3.checkpoint.engine_files import gather_persistent, without_barriers  # imports deepspeed

    try:
        with without_barriers(engine.optimizer):
            on_all_ranks(f"loading {folder}", restore, fix)
    finally:
        gather_persistent(engine.optimizer)
    if source is not None:
        from unimo3.checkpoint.elastic import gather_weights

        gather_weights(engine.optimizer)
    return state


def quarantine(damaged: list[Path]) -> None:
    """Rename damaged checkpoints that `choose` returned, if they still are: they are then neither counted nor replaced.

    For a run that has loaded a good one. If none is good, the mount may have failed.
    """
    for folder in damaged:
        # A read that failed once is not damage.
        if _problems(folder) and world()[0] == 0:
            rename_damaged(folder)


def _listed(run: Path) -> list[Path]:
    """Rank 0's listing for all ranks: on a shared file system others may still see an older one."""
    folders: list[Path] = from_first_rank(f"listing {folder_of(run)}", lambda: list_folders(run), _LOOK)
    return folders


def _problems(folder: Path) -> list[str]:
    """The problems of all ranks' parts of a verification; every rank calls it."""
    rank, size = world()
    by_rank = on_all_ranks(f"verifying {folder}", lambda: verify(folder, rank, size), _LOOK)
    return list(dict.fromkeys(problem for problems in by_rank for problem in problems))


def rename_damaged(folder: Path) -> None:
    """Quarantine a checkpoint; what cannot be renamed is logged and left."""
    target = folder.with_name(f"{folder.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged{number}")
    try:
        folder.rename(target)
        log.warning("%s is quarantined as %s; remove it when nobody needs it", folder, target.name)
    except OSError as error:
        log.warning("%s cannot be quarantined (%s)", folder, error)
