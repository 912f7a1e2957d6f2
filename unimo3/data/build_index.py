"""Existing shards: writes an index next to them, and verifies that they are still as indexed.

Source: none.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unimo3.data.conversion import MARK
from unimo3.data.index import INDEX, MEMBERS, SHARDS, ShardIndex, is_index, rejected_ids
from unimo3.data.index_form import field, is_ids_or_none, is_text
from unimo3.data.members import IMAGE_EXTENSIONS
from unimo3.data.mpi_jobs import failing, spread
from unimo3.data.progress import PreparationProgress
from unimo3.data.shard_records import Shard
from unimo3.data.shards import (
    ShardDone,
    error_of,
    finish,
    index_tar,
    members_error,
    remove_traces,
    survey,
    unindexed_shards,
)
from unimo3.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_NUM_SHOWN = 10
_LOCK = ".unimo3-lock"
# Plain and compressed tars, and parts of them, such as those of split(1).
_ENDINGS = "gz|bz2|xz|zst|zstd|lz|lz4|lzma|lzo|br|sz|z|7z|zip"
_PARTS = r"[a-z]{2}|aa[a-z]|part\d*|\d+"
_TAR = re.compile(
    rf"\.(tar|tar(\.({_ENDINGS}))?(\.({_PARTS}))?|(tgz|taz|tbz2?|tz2|txz|tlz|tzst)(\.({_PARTS}))?)$", re.IGNORECASE
)


def index(source: Path, overwrite: bool, comm: Any) -> None:
    """Index the tars of a folder where they lie; every rank calls it.

    Raises:
        ConfigError: another process is indexing them, a folder is in the way of a file of the index, or the index.json
            of another program is there and `overwrite` is not given.
        DataError: a tar cannot be read, is compressed, or is missing or not the one that was indexed before and
            `overwrite` is not given; or none of their samples has an image and a text.
    """
    folder, progress = source.resolve(), PreparationProgress("samples")
    paths = sorted(folder.glob("*.tar"))

    def jobs() -> Iterator[Path]:
        _check_source(source, folder, paths, overwrite)
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
                _check_unchanged(folder, names)
            tars = survey(folder, names)
            if tars.num_samples and not tars.num_complete:
                raise DataError(
                    f"--src {source}: none of its {tars.num_samples} samples can be read: {tars.num_imageless} have "
                    f"no image ({', '.join(IMAGE_EXTENSIONS)}), {tars.num_textless} no json and no txt; make the tars "
                    "again"
                )
            dataset, split, missing_ids = _origin(folder)
            finish(folder, dataset, split, names, missing_ids)
            remove_traces(folder, names)
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
    print(f"{source}: {tars.num_samples} samples in {len(paths)} shards")
    if tars.num_complete < tars.num_samples:
        print(
            f"{source}: {tars.num_imageless} samples have no image, {tars.num_textless} no json and no txt; they are "
            "bad samples"
        )
    for name, key, number in tars.repeated[:_NUM_SHOWN]:
        print(f"{name}: {number} samples have the key of an earlier sample, such as {key!a}, and are separate samples")
    if len(tars.repeated) > _NUM_SHOWN:
        print(f"and so in {len(tars.repeated) - _NUM_SHOWN} more tars")


def _check_source(source: Path, folder: Path, paths: list[Path], overwrite: bool) -> None:
    """Check that the folder has tars, all of which can be read, and that an index may be written there."""
    if others := _not_plain(folder):
        raise DataError(
            f"--src {source}: {len(others)} tars are compressed or in parts, or their names do not end in .tar "
            f"({', '.join(others[:3])}); decompress, join and rename them, or move them away"
        )
    if not paths:
        raise DataError(f"--src {source}: no .tar files there; an index needs at least one shard")
    files = (INDEX, SHARDS, MEMBERS)
    for name in (*files, *(f"{name}.tmp" for name in files)):
        if (folder / name).is_dir():
            raise ConfigError(f"--src {source}: {name} is a folder; move it away, the index is written there")
    if (folder / INDEX).exists() and not (overwrite or is_index(folder)):
        raise ConfigError(
            f"--src {source}: its {INDEX} was not written by this program, or is damaged; move it away, or give "
            "--overwrite"
        )


def _not_plain(folder: Path) -> list[str]:
    """Names of the tars that are compressed or in parts, or whose ending is not .tar."""
    return sorted(path.name for path in folder.iterdir() if _TAR.search(path.name) and path.suffix != ".tar")


def _check_unchanged(folder: Path, names: Collection[str]) -> None:
    """Refuse to index changed tars again, or fewer, which would make a damaged copy valid.

    Raises:
        DataError: a tar is not the one that was indexed before, or is missing.
    """
    try:
        before = {shard.name: shard.sha256 for shard in ShardIndex(folder, check_files=False).shards}
    except DataError:
        return  # an index of an older version, or one that lacks a field
    changed = [name for name, sha256 in unindexed_shards(folder).items() if before.get(name, sha256) != sha256]
    if changed:
        differ = "1 tar differs" if len(changed) == 1 else f"{len(changed)} tars differ"
        raise DataError(
            f"{folder}: {differ} from the index ({', '.join(changed[:3])}); copy the tars again, or give --overwrite "
            "after a change on purpose"
        )
    if missing := sorted(before.keys() - set(names)):
        absent = "1 tar of the index is" if len(missing) == 1 else f"{len(missing)} tars of the index are"
        raise DataError(
            f"{folder}: {absent} missing ({', '.join(missing[:3])}); copy the tars again, or give --overwrite after a "
            "removal on purpose"
        )


def _origin(folder: Path) -> tuple[str, str, list[int | str]]:
    """Data set, split, and the ids that the split lacks: by the conversion's record, else by an earlier index.

    The folder may have been renamed or moved since, so its name counts only where it has neither.

    Raises:
        DataError: the list of rejected records of an earlier index or of a conversion cannot be read.
    """
    for name in (MARK, INDEX):
        try:
            content = json.loads((folder / name).read_bytes()) if name == MARK or is_index(folder) else None
            dataset, split = field(content, "dataset", is_text), field(content, "split", is_text)
            missing_ids = field(content, "missing_ids", is_ids_or_none)
        except (OSError, ValueError, RecursionError, KeyError):
            continue
        return dataset, split, rejected_ids(folder, split) if missing_ids is None else missing_ids
    is_converted = (folder.parent / MARK).exists()
    return folder.parent.name, folder.name, rejected_ids(folder, folder.name) if is_converted else []


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
