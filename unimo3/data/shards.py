"""Samples -> WebDataset shards with their index, written atomically, by one process or many.

A shard is a number of consecutive records of its split, whatever becomes of their images, so shards can be written in
any order and by anybody and are the same bytes. Each finished shard has its table and then a note that it is done
next to it; by these notes, a conversion that was killed resumes. At the end the index is made of the tables.

Source: webdataset's TarWriter; members carry fixed owner, mode and time, so equal input gives equal bytes.
"""

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimo3.data.formats.record import Sample
from unimo3.data.index import INDEX, MEMBERS, MORE_FOLLOWS, REINDEX, SHARDS
from unimo3.data.index_writer import ShardTable, table_of, write_index
from unimo3.data.members import Members, sha256_of
from unimo3.data.shard_records import Shard
from unimo3.data.stored_images import ImageOptions, UnusableImageError, read_image
from unimo3.data.tar_members import another_tar_follows
from unimo3.errors import DataError

# Names that nobody else uses: they are also written next to the tars of others while these are indexed.
_DONE, _TABLE = ".unimo3-done", ".unimo3-table"


@dataclass(frozen=True)
class ShardJob:
    """Records of one shard.

    Attributes:
        number: of the shard in its split.
    """

    split: str
    number: int
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """The tar's file name."""
        return f"{self.number:06d}.tar"

    def digest(self, options: ImageOptions) -> str:
        """Digest of all that decides the shard's content, except the images' bytes."""
        parts = [
            [sample.key, [str(path) for path in sample.images], sample.content, sample.problem]
            for sample in self.samples
        ]
        text = json.dumps([parts, asdict(options)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Reject:
    """A record without a usable image.

    Attributes:
        ids: of its entries, by which the data set's evaluation names them.
    """

    split: str
    key: str
    image: str
    reason: str
    ids: Sequence[int | str] = ()


@dataclass(frozen=True)
class ShardDone:
    """The result of a job."""

    split: str
    number: int
    num_records: int
    rejects: tuple[Reject, ...]
    reused: bool


def cut(samples: Iterator[tuple[str, Sample]], samples_per_shard: int) -> Iterator[ShardJob]:
    """Records -> jobs, as soon as each has its number of records; the rests come last."""
    waiting: dict[str, list[Sample]] = {}
    numbers: dict[str, int] = {}
    for split, sample in samples:
        waiting.setdefault(split, []).append(sample)
        if len(waiting[split]) == samples_per_shard:
            number = numbers.setdefault(split, 0)
            numbers[split] += 1
            yield ShardJob(split, number, tuple(waiting[split]))
            waiting[split] = []
    for split, rest in waiting.items():
        if rest:
            yield ShardJob(split, numbers.get(split, 0), tuple(rest))


def write_shard(
    job: ShardJob, folder: Path, options: ImageOptions, between: Callable[[], None] = lambda: None
) -> ShardDone:
    """Write one shard into ``folder/SPLIT``, unless it is there already, complete and of the same records.

    Args:
        between: called after every image.
    """
    from webdataset import TarWriter  # which imports torch

    target = folder / job.split / job.name
    done, digest = target.with_suffix(_DONE), job.digest(options)
    if (earlier := _still_good(job, target, digest, options)) is not None:
        return ShardDone(job.split, job.number, len(job.samples), earlier, reused=True)
    done.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    rejects = []
    # Named after the process: one that a kill has orphaned may still be at it.
    staging = target.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
    with staging.open("wb") as file:
        tar = TarWriter(file, user="unimo3", group="unimo3", mtime=0.0, encoder=False)
        for sample in job.samples:
            try:
                images = _read_images(sample, options)
            except UnusableImageError as error:
                rejects.append(Reject(job.split, sample.key, str(error.path), error.reason, sample.ids))
            else:
                tar.write({"__key__": sample.key, **_members(sample, images)})
            between()
        tar.close()
    staging.replace(target)
    _record_done(target, digest, rejects)
    return ShardDone(job.split, job.number, len(job.samples), tuple(rejects), reused=False)


def _still_good(job: ShardJob, target: Path, digest: str, options: ImageOptions) -> tuple[Reject, ...] | None:
    """The rejects of a shard that an earlier attempt has finished; None if it has to be written again."""
    earlier = _read_done(target.with_suffix(_DONE))
    if earlier is None or earlier["digest"] != digest:
        return None
    # After a crash of the machine the tar may be shorter than recorded.
    if not target.is_file() or target.stat().st_size != earlier["table"]["num_bytes"]:
        return None
    rejects = tuple(Reject(**reject) for reject in earlier["rejects"])
    of_key = {sample.key: sample for sample in job.samples}
    for reject in rejects:
        try:
            _read_images(of_key[reject.key], options)
        except UnusableImageError:
            continue
        return None  # it has been fixed
    return rejects


def index_tar(path: Path) -> ShardDone:
    """Make the table of a tar that is there already, of any program, unless an earlier attempt has made one.

    Raises:
        DataError: it cannot be read.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again, or remove the link") from error
    digest = f"{state.st_size} {state.st_mtime_ns}"
    earlier = _read_done(path.with_suffix(_DONE))
    done = earlier if earlier is not None and earlier["digest"] == digest else _record_done(path, digest, [])
    return ShardDone(path.parent.name, 0, done["table"]["num_samples"], (), reused=done is earlier)


def finish(folder: Path, dataset: str, split: str, names: Sequence[str], missing_ids: Sequence[int | str] = ()) -> int:
    """Make a folder's index of the tables next to its finished shards; `remove_traces` comes after.

    Args:
        missing_ids: of the entries that the split has and the shards do not.

    Returns:
        Number of samples.

    Raises:
        DataError: the shards contain none.
    """
    stems = [folder / name.removesuffix(".tar") for name in names]
    return write_index(folder, dataset, split, (_saved_table(stem) for stem in stems), missing_ids)


@dataclass(frozen=True)
class Survey:
    """What the tables next to finished shards show of their samples.

    Attributes:
        num_samples, num_imageless, num_textless, num_complete: of all, of those without an image, without a text, and
            with both.
        repeated: the tars in which several samples have one key: name, such a key, and how many have an earlier one's.
    """

    num_samples: int
    num_imageless: int
    num_textless: int
    num_complete: int
    repeated: list[tuple[str, str, int]]


def survey(folder: Path, names: Sequence[str]) -> Survey:
    """Look through the tables next to finished shards."""
    counts = np.zeros(4, dtype=np.int64)
    repeated = []
    for name in names:
        members = Members.from_bytes(_saved_table((folder / name).with_suffix("")).table)
        keys = members.keys
        of_key = Counter(keys)
        if len(of_key) < len(keys):
            key = of_key.most_common(1)[0][0].decode("utf-8", "surrogateescape")
            repeated.append((name, key, len(keys) - len(of_key)))
        has_image, has_text = members.parts()
        counts += len(keys), (~has_image).sum(), (~has_text).sum(), (has_image & has_text).sum()
    num_samples, num_imageless, num_textless, num_complete = counts.tolist()
    return Survey(num_samples, num_imageless, num_textless, num_complete, repeated)


def unindexed_shards(folder: Path) -> dict[str, str]:
    """SHA-256 of each tar that has been finished and not yet indexed."""
    notes = [note for path in sorted(folder.glob(f"*{_DONE}")) if (note := _read_done(path)) is not None]
    return {note["table"]["name"]: note["table"]["sha256"] for note in notes}


def remove_traces(folder: Path, names: Sequence[str]) -> None:
    """Remove the notes and tables next to finished shards."""
    for name in names:
        for suffix in (_DONE, _TABLE):
            (folder / name).with_suffix(suffix).unlink(missing_ok=True)


def remove_unlisted(folder: Path, names: Sequence[str]) -> None:
    """Remove the files of an earlier attempt with other arguments next to a split's shards."""
    stems = {name.removesuffix(".tar") for name in names}
    for path in folder.iterdir():
        is_listed = path.stem in stems and path.suffix in (".tar", _DONE, _TABLE)
        if path.name not in (INDEX, SHARDS, MEMBERS) and not is_listed:
            path.unlink()


def members_error(folder: Path, expected: str) -> str | None:
    """How a folder's ``index.members`` differs from the SHA-256 in its index, if it does."""
    path = folder / MEMBERS
    try:
        actual = sha256_of(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if actual == expected else f"{path}: is not the one {INDEX} was written with"


def error_of(folder: Path, shard: Shard) -> str | None:
    """Read a complete shard; how it differs from its index, if it does."""
    path = folder / shard.name
    try:
        actual = sha256_of(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if actual != shard.sha256:
        return f"{path}: is not the shard that was indexed (SHA-256 {actual[:12]})"
    if isinstance(shard.num_items, int):
        with path.open("rb") as file:
            return f"{path}: {MORE_FOLLOWS}; {REINDEX}" if another_tar_follows(file, 0) else None
    return None


def _read_images(sample: Sample, options: ImageOptions) -> list[tuple[str, bytes]]:
    """The sample's images as stored.

    Raises:
        UnusableImageError: the record or an image cannot be used.
    """
    if sample.problem:
        raise UnusableImageError(sample.images[0], sample.problem)
    return [read_image(path, options) for path in sample.images]


def _members(sample: Sample, images: list[tuple[str, bytes]]) -> dict[str, bytes]:
    content = json.dumps(sample.content, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    # Several images of a sample are distinguished by a number before their extension.
    names = [extension if len(images) == 1 else f"{number}.{extension}" for number, (extension, _) in enumerate(images)]
    return {name: data for name, (_, data) in zip(names, images, strict=True)} | {"json": content}


def _replace(path: Path, content: bytes) -> None:
    staging = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    staging.write_bytes(content)
    staging.replace(path)


def _record_done(tar: Path, digest: str, rejects: list[Reject]) -> dict[str, Any]:
    """Write what `finish` needs of a shard, and last the note that it is done; return that note."""
    table = table_of(tar)
    _replace(tar.with_suffix(_TABLE), table.table)
    facts = {name: value for name, value in asdict(table).items() if name != "table"}
    content = {"digest": digest, "table": facts, "rejects": [asdict(reject) for reject in rejects]}
    _replace(tar.with_suffix(_DONE), json.dumps(content).encode())
    return content


def _read_done(path: Path) -> dict[str, Any] | None:
    """The note of a finished shard; None if there is none, or it is of another form, such as an older version's."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        table = ShardTable(**content["table"], table=b"")
        _ = content["digest"], [Reject(**reject) for reject in content["rejects"]]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    # An older version counted the items of one kind.
    return content if isinstance(table.num_items, dict) else None


def _saved_table(stem: Path) -> ShardTable:
    done, table = _read_done(Path(f"{stem}{_DONE}")), Path(f"{stem}{_TABLE}")
    if done is None or not table.is_file():
        raise DataError(
            f"{stem}.tar: its note and its table have been removed ({_DONE}, {_TABLE}); start the same command again"
        )
    return ShardTable(**done["table"], table=table.read_bytes())
