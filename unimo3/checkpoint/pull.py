"""Copies a run's checkpoints from an object store to a disk, where each appears complete or not at all.

    RUN.pull/         the copy while it is made, if there is no folder RUN; it becomes RUN by a rename
    RUN/pull.tmp/     the same if there is one; each checkpoint then gets its name by a rename

Each file is compared with its checkpoint's manifest while it is received; of a large one, ranges are received in
parallel. A pull after a kill verifies what it finds in its staging folder and receives the rest, also of a file.

Source: unimo3/checkpoint/export.py for the folder that appears by a rename.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from unimo3.atomic_write import naming, replace_bytes
from unimo3.checkpoint import store
from unimo3.checkpoint.best_record import BEST
from unimo3.checkpoint.load import rename_damaged
from unimo3.checkpoint.manifest import MANIFEST, file_problem, flush_folder, read_entries, write_and_flush
from unimo3.checkpoint.stored_run import CHECKPOINTS, CONFIG, NUM_JOBS, RANGE_BYTES, StoredRun, receive
from unimo3.errors import CheckpointError, ConfigError, UnreachableError
from unimo3.object_store import ObjectChangedError, StoreError

log = logging.getLogger(__name__)

_PART = ".part"
_NUM_LISTINGS = 5
# What a pull that was killed leaves in an empty folder.
_OF_A_PULL = {"pull.tmp", "pull.tmp.lock", "heartbeats"}


def pull(
    url: str,
    run: Path,
    tag: str | None = None,
    num_jobs: int = NUM_JOBS,
    lock_run: Callable[[Path], None] = lambda run: None,
    takes_best: bool = True,
) -> list[str]:
    """Copy a checkpoint, and what else a resume reads, into a run's folder.

    Args:
        url: of a run that `push` has copied.
        run: the folder; it may contain an older state of the same run.
        tag: of the checkpoint; ``best``: the best on held-out data. None: the newest good one, and the best too.
        num_jobs: files received at a time.
        lock_run: raises an error if another process uses the folder, and else prevents that until this process ends.

        takes_best: whether a pull without a tag copies the best checkpoint too.

    Returns:
        Names of the checkpoints that the folder has now from there, the chosen one first.

    Raises:
        ConfigError: the folder is not that run's, or in use.
        CheckpointError: there is no good checkpoint, or the folder has a newer one.
        StoreError: the store refuses.
        UnreachableError: the store does not answer.
    """
    run = run.resolve()
    remote = StoredRun(url)
    remote.choose(tag)  # before anything is made
    exists = run.is_dir()
    if exists and not {path.name for path in run.iterdir()} <= _OF_A_PULL:
        _check_same_run(remote, run)
    if exists:
        lock_run(run)
    staging = run / "pull.tmp" if exists else run.with_name(run.name + ".pull")
    with _only_pull_to(run, staging):
        for _ in range(_NUM_LISTINGS):
            try:
                tags = _receive_run(remote, staging, run, tag, num_jobs, takes_best)
                break
            except (StoreError, ObjectChangedError) as error:
                # A push behind a training that goes further removes old checkpoints.
                listed = StoredRun(url)
                if listed.objects == remote.objects:
                    raise
                log.warning("%s; %s has changed and is listed again", error, url)
                remote = listed
        else:
            raise CheckpointError(f"{url}: changes faster than it can be read; name a checkpoint with --tag")
        if exists:
            _move_into(staging, run)
        else:
            flush_folder(staging)
            try:
                staging.rename(run)
            except OSError as error:
                raise ConfigError(
                    f"{run}: appeared while it was pulled ({error.strerror}); stop a run that has begun there, "
                    "move it away, then start the same command again"
                ) from error
            flush_folder(run.parent)
    return tags


def _check_same_run(remote: StoredRun, run: Path) -> None:
    if not (run / CONFIG).is_file() or CONFIG not in remote.objects:
        raise ConfigError(f"{run}: exists and is no folder of the run in {remote.url}; name a new folder")
    if (run / CONFIG).read_bytes() != remote.read(CONFIG):
        raise ConfigError(f"{run}: its {CONFIG} is not that of {remote.url}, so it is another run; name a new folder")


def _receive_run(
    remote: StoredRun, staging: Path, run: Path, tag: str | None, num_jobs: int, takes_best: bool
) -> list[str]:
    """Complete the staging folder; the names of the checkpoints in it, or already in the run's folder."""
    chosen = _receive_good(remote, staging, run, tag, num_jobs)
    tags = [chosen]
    best = remote.best_tag()
    if best is not None and best != chosen and tag is None and takes_best:
        try:
            _receive_checkpoint(remote, best, staging, run, num_jobs)
            tags.append(best)
        except UnreachableError:
            raise
        except CheckpointError as error:
            log.warning("%s: the best checkpoint is damaged and not copied: %s", remote.url, error)
            best = None
    folder = staging / CHECKPOINTS
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in tags:
            shutil.rmtree(path)  # of a pull before, of what was newest then
    names = [*remote.run_files(), *([BEST] if best in tags else [])]
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(staging / name, remote.read(name))
    return tags


def _receive_good(remote: StoredRun, staging: Path, run: Path, tag: str | None, num_jobs: int) -> str:
    chosen = remote.choose(tag)
    for candidate in [chosen] if tag is not None else reversed(remote.tags()):
        try:
            _refuse_newer(run, candidate, remote.url)
            _receive_checkpoint(remote, candidate, staging, run, num_jobs)
        except (UnreachableError, _NewerError):
            raise
        except CheckpointError as error:
            if tag is not None:
                raise
            log.warning("%s: %s is damaged and skipped: %s", remote.url, candidate, error)
        else:
            return candidate
    raise CheckpointError(f"{remote.url}: none of its checkpoints is good; push the run again from a good copy")


class _NewerError(CheckpointError):
    """The run's folder has a newer checkpoint."""


def _refuse_newer(run: Path, tag: str, url: str) -> None:
    for folder in reversed(store.list_checkpoints(run)):
        if store.step_of(folder) <= store.step_of(Path(tag)):
            return
        if not store.verify(folder):
            raise _NewerError(
                f"{run}: has {folder.name}, which is newer than {tag} of {url}; the run resumes from it without a "
                "pull, so name a new folder, or move it away"
            )


def _receive_checkpoint(remote: StoredRun, tag: str, staging: Path, run: Path, num_jobs: int) -> None:
    """Complete a checkpoint in the staging folder, unless the run's folder has it.

    Raises:
        CheckpointError: a file does not match the manifest.
        StoreError: an object is not there.
    """
    text = remote.read_manifest(tag)
    where = remote.url_of(f"{CHECKPOINTS}/{tag}/{MANIFEST}")
    entries = read_entries(text, where)
    existing = store.folder_of(run) / tag
    if existing.is_dir():
        if (existing / MANIFEST).is_file() and (existing / MANIFEST).read_text(errors="replace") == text:
            if not store.verify(existing):
                print(f"{tag}: {existing} is there and good", flush=True)
                return
        elif not store.verify(existing):
            raise CheckpointError(f"{existing}: is another checkpoint of this step; move it away, or name a new folder")
    started = time.monotonic()
    folder = staging / CHECKPOINTS / tag
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_jobs) as pool:
        started_files = [
            pool.submit(_receive_file, remote.url_of(f"{CHECKPOINTS}/{tag}/{entry['name']}"), folder, entry)
            for entry in entries
        ]
        try:
            received = [file.result() for file in as_completed(started_files)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
            raise
    listed = {entry["name"] for entry in entries}
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in listed:
            path.unlink()  # of a checkpoint of this name that has been replaced
    write_and_flush(folder / MANIFEST, text)
    flush_folder(folder)
    seconds, num_bytes = time.monotonic() - started, sum(received)
    print(
        f"{tag}: {num_bytes / 1e6:.1f} MB in {sum(map(bool, received))} files received in {seconds:.1f} s, "
        f"{num_bytes / 1e6 / max(seconds, 1e-3):.0f} MB/s",
        flush=True,
    )


def _receive_file(url: str, folder: Path, entry: dict[str, Any]) -> int:
    """A checkpoint's file, verified; the number of bytes received, 0 if the folder has it."""
    path = folder / entry["name"]
    if path.is_file() and not file_problem(folder, entry):
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + _PART)
    with naming(part), part.open("r+b" if part.is_file() else "w+b") as file:

        def write(chunk: bytes) -> None:
            file.write(chunk)
            file.flush()  # a kill loses the range that is written, no more

        is_begun = os.fstat(file.fileno()).st_size >= RANGE_BYTES
        problem = receive(url, write, entry, _beginning(file, entry["bytes"]))
        if problem and is_begun:  # it was of an object that has been replaced, or did not reach the disk
            file.seek(0)
            file.truncate()
            problem = receive(url, write, entry)
        os.fsync(file.fileno())
    if problem:
        part.unlink()
        raise CheckpointError(f"{url}: {problem}; delete this checkpoint there and push it again")
    part.replace(path)
    num_bytes: int = entry["bytes"]
    return num_bytes


def _beginning(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """The complete ranges in an incomplete file, which ends with them then."""
    for _ in range(min(os.fstat(file.fileno()).st_size, limit) // RANGE_BYTES):
        yield file.read(RANGE_BYTES)
    file.truncate(file.tell())


def _move_into(staging: Path, run: Path) -> None:
    """Give the parts of a complete staging folder their names: a kill in between leaves a run that resumes."""
    checkpoints = store.folder_of(run)
    checkpoints.mkdir(exist_ok=True)
    paths = [path for path in staging.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(staging).as_posix() for path in paths)
    # Metrics may be of later steps than the newest checkpoint, which a resume drops; the opposite would leave a gap.
    for name in [name for name in names if not name.startswith(f"{CHECKPOINTS}/") and name != BEST]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(run / name)
    for folder in sorted((staging / CHECKPOINTS).glob("step_*")):
        if (checkpoints / folder.name).exists():
            rename_damaged(checkpoints / folder.name)
        folder.rename(checkpoints / folder.name)
    flush_folder(checkpoints)
    if (staging / BEST).is_file():
        (staging / BEST).replace(run / BEST)
    shutil.rmtree(staging)


@contextmanager
def _only_pull_to(run: Path, staging: Path) -> Iterator[None]:
    """While in it, no other process pulls to the same folder."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    path = staging.with_name(staging.name + ".lock")
    try:
        with FileLock(path, timeout=0, fallback_to_soft=False):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise ConfigError(f"{run}: another process pulls to it; wait for its end") from error
