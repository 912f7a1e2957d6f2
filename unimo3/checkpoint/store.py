"""A run's checkpoints on disk: their names, listing and removal; it imports no torch.

    RUN/checkpoints/step_00001000/   DeepSpeed's files of every rank, rng_rank_*.safetensors, state.json, MANIFEST.json
    RUN/checkpoints/step_00001000.damaged  one that a resuming run found damaged, for people to look at
    RUN/checkpoints/latest           name of the newest one, for people and for DeepSpeed's tools

A folder without a valid manifest is no checkpoint.
"""

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from unimo3.checkpoint.best_record import read_best
from unimo3.checkpoint.manifest import MANIFEST, STATE, verify

__all__ = [
    "MANIFEST",
    "SAVE_FIX",
    "STATE",
    "folder_of",
    "has_folders",
    "is_tag",
    "list_checkpoints",
    "list_folders",
    "prune",
    "quarantined_folders",
    "superseded",
    "tag_of",
    "verify",
]

log = logging.getLogger(__name__)

SAVE_FIX = "earlier checkpoints are untouched; check space, quota and permissions of the run's folder"
"""What to do when a save fails."""
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
    return bool(list_folders(run) or quarantined_folders(run))


def quarantined_folders(run: Path) -> list[Path]:
    """Damaged checkpoints that `load.quarantine` has renamed, oldest first."""
    return _folders(run, _QUARANTINED)


def list_folders(run: Path) -> list[Path]:
    """All that is named as a checkpoint, oldest first, with or without a manifest."""
    return _folders(run, _TAG)


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first; what was never committed is not among them."""
    return [folder for folder in list_folders(run) if (folder / MANIFEST).is_file()]


def restore_replaced(run: Path) -> None:
    """Give a checkpoint its name back that a kill has left renamed while its step was saved again.

    For the process that trains the run: a read-only process could interfere between the two renames of a save.
    """
    for path in folder_of(run).glob(f"step_*{REPLACED}"):
        folder = path.with_name(path.name.removesuffix(REPLACED))
        if not folder.exists():
            log.warning("%s: a second save of this step was interrupted; the earlier checkpoint is used", folder)
            path.rename(folder)


def superseded(names: Sequence[str], keep_last: int, keep_every: int, best: Collection[str]) -> list[str]:
    """Which checkpoints a retention removes; the newest one is never among them.

    Args:
        names: of checkpoints, oldest first.
        keep_last: newest ones to keep, at least 1.
        keep_every: steps; multiples of it stay. 0: none.
        best: names of checkpoints that stay.
    """
    old = names[: -max(1, keep_last)]
    return [name for name in old if not (keep_every and step_of(Path(name)) % keep_every == 0) and name not in best]


def is_tag(name: str) -> bool:
    """Whether a name is that of a checkpoint."""
    return _TAG.match(name) is not None


def prune(run: Path, keep_last: int, keep_every: int, known_good: Path | None = None) -> list[Path]:
    """Remove old checkpoints and return them; the newest good one is never removed, and none is if none is good.

    The one that `best_record.py` has recorded as the best is not removed either.

    Args:
        keep_last: newest ones to keep, at least 1.
        keep_every: steps; multiples of it stay. 0: none.
        known_good: the newest one, if it needs no verification here, such as one just saved.
    """
    checkpoints = list_checkpoints(run)
    best = read_best(run)
    names = superseded([folder.name for folder in checkpoints], keep_last, keep_every, {best.tag} if best else set())
    removable = [folder for folder in checkpoints if folder.name in names]
    if not removable:
        return []
    good = known_good or next((folder for folder in reversed(checkpoints) if not verify(folder)), None)
    if good is None:
        log.warning("%s: none of the checkpoints is good; none is removed", run)
        return []
    if good in removable:
        log.warning("%s: %s is not removed: it is the newest good checkpoint", run, good.name)
        removable.remove(good)
    for folder in removable:
        _remove(folder)
    return removable


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
