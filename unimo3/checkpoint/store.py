"""Checkpoints on disk: committed atomically, verified before use.

    RUN/checkpoints/step_00001000/   DeepSpeed's files of every rank, rng_rank_*.safetensors, state.json, MANIFEST.json
    RUN/checkpoints/step_00001000.damaged  one that a resuming run found damaged, for people to look at
    RUN/checkpoints/latest           name of the newest one, for people and for DeepSpeed's tools

A folder without a valid manifest is no checkpoint. Saves are in saver.py and commit.py.

Source: DeepSpeed's engine.load_checkpoint for the tensors.
"""

import logging
import re
import shutil
from pathlib import Path

from unimo3.checkpoint.best_record import read_best
from unimo3.checkpoint.manifest import MANIFEST, STATE, verify
from unimo3.checkpoint.state import TrainState, load_rng
from unimo3.distributed import on_all_ranks, world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "STATE",
    "choose",
    "folder_of",
    "has_folders",
    "list_checkpoints",
    "list_folders",
    "load",
    "newest_good",
    "prune",
    "quarantine",
    "quarantined_folders",
    "tag_of",
    "verify",
]

log = logging.getLogger(__name__)

_LOOK = "see that every node can read the run's folder"
_TAG = re.compile(r"^step_\d{8,}$")
_QUARANTINED = re.compile(r"^step_\d{8,}\.damaged\d*$")
# Suffix of a checkpoint whose step is saved again, until the new one has its name.
REPLACED = ".replaced.tmp"


def tag_of(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The number of optimizer steps in a checkpoint's name."""
    return int(folder.name.removeprefix("step_").split(".")[0])


def folder_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def has_folders(run: Path) -> bool:
    """Whether anything is named as a checkpoint, good or not."""
    return bool(_candidates(run) or quarantined_folders(run))


def quarantined_folders(run: Path) -> list[Path]:
    """Damaged checkpoints that `quarantine` has renamed, oldest first."""
    return _folders(run, _QUARANTINED)


def list_folders(run: Path) -> list[Path]:
    """All that is named as a checkpoint, oldest first, with or without a manifest."""
    return _candidates(run)


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first; what was never committed is not among them."""
    return [folder for folder in _candidates(run) if (folder / MANIFEST).is_file()]


def describe_engine(engine: Engine) -> str:
    """What decides the form of an engine's files, such as ``ZeRO-3 bf16``."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    return f"ZeRO-{engine.zero_optimization_stage()} {precision}"


def load(engine: Engine, folder: Path) -> TrainState:
    """Restore engine and generators from a verified checkpoint of any number of ranks; every rank calls it.

    DeepSpeed wants an engine that has not saved before.

    Raises:
        CheckpointError: on every rank; it was written under another ds_config or by another model, or a rank cannot
            read its part.
    """
    rank, size = world()
    fix = "move this checkpoint away to resume from the one before it"
    state: TrainState = on_all_ranks(f"reading {folder / STATE}", lambda: TrainState.read(folder / STATE), fix)[0]
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
        saved_rank = rank % state.world_size
        load_rng(folder / f"rng_rank_{saved_rank}.safetensors", new_rank=rank if saved_rank != rank else None)

    from unimo3.checkpoint.engine_files import gather_persistent, without_barriers  # imports deepspeed

    try:
        with without_barriers(engine.optimizer):
            on_all_ranks(f"loading {folder}", restore, fix)
    finally:
        gather_persistent(engine.optimizer)
    return state


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint whose files all match its manifest; see `choose`."""
    return choose(run)[0]


def choose(run: Path) -> tuple[Path | None, list[Path]]:
    """The newest good checkpoint and the damaged ones that are newer; each rank verifies a part and all agree.

    A damaged one is named in the log with the reason, and the next older is tried.

    Raises:
        CheckpointError: on every rank; a rank cannot read the folder.
    """
    damaged: list[Path] = []
    # All ranks use rank 0's listing: on a shared file system others may still see an older one.
    listed = on_all_ranks(f"listing {folder_of(run)}", lambda: _candidates(run) if world()[0] == 0 else None, _LOOK)[0]
    for folder in reversed(listed):
        if not (problems := _problems(folder)):
            return folder, damaged
        damaged.append(folder)
        if world()[0] == 0:
            log.warning("%s is damaged and skipped: %s", folder, "; ".join(problems))
    return None, damaged


def restore_replaced(run: Path) -> None:
    """Give a checkpoint its name back that a kill has left renamed while its step was saved again.

    For the process that trains the run: what only reads could come between the two renames of a save.
    """
    for path in folder_of(run).glob(f"step_*{REPLACED}"):
        folder = path.with_name(path.name.removesuffix(REPLACED))
        if not folder.exists():
            log.warning("%s: saving it again was cut off; the earlier one is used", folder)
            path.rename(folder)


def _problems(folder: Path) -> list[str]:
    """The problems of all ranks' parts of a verification; every rank calls it."""
    rank, size = world()
    by_rank = on_all_ranks(f"verifying {folder}", lambda: verify(folder, rank, size), _LOOK)
    return list(dict.fromkeys(problem for problems in by_rank for problem in problems))


def quarantine(damaged: list[Path]) -> None:
    """Rename damaged checkpoints that `choose` returned, if they still are: they are then neither counted nor replaced.

    For a run that has loaded a good one. If none is good, the mount may have failed.
    """
    for folder in damaged:
        # A read that failed once is not damage.
        if _problems(folder) and world()[0] == 0:
            _quarantine(folder)


def _quarantine(folder: Path) -> None:
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


def prune(run: Path, keep_last: int, keep_every: int, known_good: Path | None = None) -> list[Path]:
    """Remove old checkpoints and return them; the newest good one is never removed, and none is if none is good.

    The one that `best_record.py` has recorded as the best is not removed either.

    Args:
        keep_last: newest ones to keep, at least 1.
        keep_every: steps; multiples of it stay. 0: none.
        known_good: the newest one, if it needs no verification here, such as one just saved.
    """
    checkpoints = list_checkpoints(run)
    old = checkpoints[: -max(1, keep_last)]
    best = read_best(run)
    removable = [
        folder
        for folder in old
        if not (keep_every and step_of(folder) % keep_every == 0) and not (best and folder.name == best.tag)
    ]
    if not removable:
        return []
    good = known_good or next((folder for folder in reversed(checkpoints) if not verify(folder)), None)
    if good is None:
        log.warning("%s: none of the checkpoints is good; none is removed", run)
        return []
    if good in removable:
        log.warning("%s: %s stays, the newest that is good", run, good.name)
        removable.remove(good)
    for folder in removable:
        _remove(folder)
    return removable


def _candidates(run: Path) -> list[Path]:
    """Folders that are named as checkpoints, oldest first."""
    return _folders(run, _TAG)


def _folders(run: Path, pattern: re.Pattern[str]) -> list[Path]:
    folder = folder_of(run)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if pattern.match(path.name) and path.is_dir()), key=step_of)


def _remove(folder: Path) -> None:
    # Renamed first, so that a kill half way leaves nothing that is named as a checkpoint.
    to_delete = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(to_delete, ignore_errors=True)
    folder.rename(to_delete)
    shutil.rmtree(to_delete, ignore_errors=True)  # the next save tries again, where somebody still reads from it
