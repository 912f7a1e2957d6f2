"""Existing shards: writes an index next to them, and verifies that they are still as indexed.

Source: none.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unimo3.data.conversion import MARK
from unimo3.data.index import INDEX, MEMBERS, ShardIndex, is_index, rejected_ids
from unimo3.data.index_form import Shard
from unimo3.data.progress import Progress
from unimo3.data.ranks import failing, spread
from unimo3.data.shards import (
    ShardDone,
    error_of,
    finish,
    index_tar,
    members_error,
    remove_traces,
    repeated_keys,
    unindexed_shards,
)
from unimo3.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_NUM_SHOWN = 10
_LOCK = ".unimo3-lock"
_TAR = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|lzo|br|z)|tgz|tbz2?|txz|tlz|tzst)$", re.IGNORECASE)


def index(source: Path, overwrite: bool, comm: Any) -> None:
    """Index the tars of a folder where they lie; every rank calls it.

    Raises:
        ConfigError: another process is indexing them, a folder is in the way of a file of the index, or the index.json
            of another program is there and `overwrite` is not given.
        DataError: a tar cannot be read, is compressed, or is not the one that was indexed before and `overwrite` is not
            given; or they contain no samples.
    """
    folder, progress = source.resolve(), Progress("samples")
    paths = sorted(folder.glob("*.tar"))

    def jobs() -> Iterator[Path]:
        if others := _not_plain(folder):
            raise DataError(
                f"--src {source}: {len(others)} tars are compressed, or their names do not end in .tar "
                f"({', '.join(others[:3])}); decompress and rename them, or move them away"
            )
        if not paths:
            raise DataError(f"--src {source}: no .tar files there; an index needs at least one shard")
        for name in (INDEX, MEMBERS, f"{INDEX}.tmp", f"{MEMBERS}.tmp"):
            if (folder / name).is_dir():
                raise ConfigError(f"--src {source}: {name} is a folder; move it away, the index is written there")
        if (folder / INDEX).exists() and not (overwrite or is_index(folder)):
            raise ConfigError(
                f"--src {source}: its {INDEX} was not written by this program, or is damaged; move it away, or give "
                "--overwrite"
            )
        yield from paths

    def work(path: Path, between: Any) -> ShardDone:
        return index_tar(path)

    if comm is not None and comm.rank > 0:
        spread(comm, iter(()), work, progress.add)
        return
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        acquired = lock.acquire()
    except (Timeout, OSError) as error:
        reason = "another process is indexing it" if isinstance(error, Timeout) else f"cannot be written to ({error})"
        spread(comm, failing(ConfigError(f"--src {source}: {reason}")), work, progress.add)
        return
    names = [path.name for path in paths]
    with acquired:
        try:
            spread(comm, jobs(), work, progress.add)
            if not overwrite and (folder / INDEX).is_file():
                _check_unchanged(folder)
            count = finish(folder, folder.parent.name, folder.name, names, _missing_ids(folder))
            repeated = repeated_keys(folder, names)
            remove_traces(folder, names)
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
    print(f"{source}: {count} samples in {len(paths)} shards")
    for name, key, number in repeated[:_NUM_SHOWN]:
        print(f"{name}: {number} samples have the key of an earlier sample, such as {key!a}, and are separate samples")
    if len(repeated) > _NUM_SHOWN:
        print(f"and so in {len(repeated) - _NUM_SHOWN} more tars")


def _not_plain(folder: Path) -> list[str]:
    """Names of the tars that are compressed, or whose ending is not .tar."""
    return sorted(path.name for path in folder.iterdir() if _TAR.search(path.name) and path.suffix != ".tar")


def _check_unchanged(folder: Path) -> None:
    """Refuse to index a changed tar again, which would make a damaged copy valid."""
    try:
        before = {shard.name: shard.sha256 for shard in ShardIndex(folder, check_files=False).shards}
    except DataError:
        return  # an index of an older version, or one that lacks a field
    changed = [name for name, sha256 in unindexed_shards(folder).items() if before.get(name, sha256) != sha256]
    if changed:
        raise DataError(
            f"{folder}: {len(changed)} tars are not those that were indexed before ({', '.join(changed[:3])}); copy "
            "them again, or give --overwrite if they were changed on purpose"
        )


def _missing_ids(folder: Path) -> list[int | str]:
    """Ids that a converted split lacks, which its tars do not show.

    Raises:
        DataError: the list of rejected records of an index that can be read, or of a conversion, cannot be read.
    """
    try:
        before = ShardIndex(folder, check_files=False)
    except DataError:
        return rejected_ids(folder, folder.name) if (folder.parent / MARK).exists() else []
    return before.missing_ids


def verify(folder: Path, comm: Any) -> None:
    """Read all shards again; every rank calls it.

    Raises:
        DataError: on rank 0, one differs from its index.
    """
    errors: list[str] = []
    num_shards = 0

    def jobs() -> Iterator[tuple[Path, Shard]]:
        nonlocal num_shards
        paths = [*folder.glob(INDEX), *folder.glob(f"*/{INDEX}"), *folder.glob("*.tar"), *folder.glob("*/*.tar")]
        splits = sorted({path.parent for path in paths})
        if not any((split / INDEX).is_file() for split in splits):
            raise DataError(f"{folder}: has no {INDEX}; prepare the shards first")
        for split in splits:
            if not (split / INDEX).is_file():
                take(f"{split}: contains tars and no {INDEX}")
                continue
            try:
                index = ShardIndex(split, check_files=False)
            except DataError as error:
                take(str(error))
                continue
            take(members_error(split, index.members_sha256))
            tars = {path.name for path in split.glob("*.tar")} - {shard.name for shard in index.shards}
            for name in sorted([*tars, *_not_plain(split)]):
                take(f"{split / name}: is not in {INDEX}")
            for shard in index.shards:
                num_shards += 1
                yield split, shard

    def take(problem: str | None) -> None:
        if problem:
            log.warning("%s", problem)
            errors.append(problem)

    spread(comm, jobs(), lambda job, between: error_of(*job), take)
    if errors:
        listed = "\n".join(f"  - {problem}" for problem in sorted(errors))
        raise DataError(
            f"{len(errors)} errors, {num_shards} shards read; copy or prepare again what is named:\n{listed}"
        )
    if comm is None or comm.rank == 0:
        print(f"{folder}: {num_shards} shards are as indexed")
