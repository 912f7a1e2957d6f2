"""The index of a folder of WebDataset shards: what is where, so that any sample is one seek away.

    FOLDER/000000.tar ...      samples ``key.jpg`` + ``key.json`` (or any members that share a key)
    FOLDER/index.json          version, dataset, split; numbers of shards, samples and items; sha256 of the other two
    FOLDER/index.shards        a record a shard: name, bytes, sha256, samples and items, and the offset, bytes and
                               sha256 of its table in index.members
    FOLDER/index.members       for each shard, every member's offset and size, and every sample's items of each kind

An item is a caption, a question or a hypothesis of a sample's ``json``; each kind is counted by itself. Records are
memory-mapped, and tables are read when a shard is first used and a few are cached, so memory does not grow with the
number of samples. The folder may be a mounted store, or the URL of an ``https:`` server or an object store, whose files
go through a local cache.

Up to version 3, index.json had the facts of the shards. Version 2 counts only the first kind of each ``json``, and a
wrong count is an error. Both stay readable.

Source: https://github.com/webdataset/webdataset for the shards' layout; the tar format of POSIX.1-1988.
"""

import hashlib
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unimo3.data.cache import ShardCache
from unimo3.data.index_form import field, is_count, is_ids_or_none, is_sha256, is_text, records_of_entries
from unimo3.data.members import COUNTED_KINDS, Members, count_items, header_error
from unimo3.data.order import SequentialOrder, Unit
from unimo3.data.remote import check_source, is_remote
from unimo3.data.sample_texts import BadSampleError, content_of, lack_of
from unimo3.data.shard_records import Shard, Shards, map_records
from unimo3.data.tar_members import another_tar_follows
from unimo3.errors import DataError
from unimo3.versions import check_version

VERSION = 4
_READABLE = (2, 3, VERSION)
INDEX, SHARDS, MEMBERS = "index.json", "index.shards", "index.members"
# A conversion's records without a usable image, next to the splits' folders.
REJECTS = "rejects.jsonl"
_TEST_SPLITS = ("test", "test-dev")
# Kinds of which each sample may have none, one or several, and each is read by itself.
ITEM_KINDS = ("questions", "hypotheses")
# A table is a few ten kB; an open shard that a cache has removed still takes its space on the disk.
_MAX_TABLES, MAX_OPEN_SHARDS = 128, 32
# Shards of a folder that are looked at when it is opened; a store takes up to a millisecond for each.
_NUM_CHECKED = 4096
# Samples that are read to judge what a folder contains.
_NUM_PROBES = 32
NO_IMAGE = "has no image"
# In an index of version 2, which has only the first of joined tars.
MORE_FOLLOWS = "another tar follows the one that was indexed"
REINDEX = "index it again with python -m pretrain.prepare_shards index, or prepare the shards again"


def is_test_split(split: str) -> bool:
    """Whether nothing is trained or chosen on a split of this name."""
    return split.lower() in _TEST_SPLITS


class ShardIndex:
    """An index, loaded; reads samples by offset, from any process.

    Args:
        source: a folder with ``index.json``, or its URL.
        cache: of copies of the shards; needed for a URL, useful for a slow mounted store.
        check_files: whether to check that the files of a folder are there and have their sizes: of many shards, of
            `_NUM_CHECKED` that are spread evenly. Each of the others is checked when it is first read.

    Raises:
        DataError: the index or a shard is missing, is damaged, or has another size than was indexed.
    """

    def __init__(self, source: Path | str, cache: ShardCache | None = None, check_files: bool = True):
        self.source = str(source)
        check_source(self.source)
        if is_remote(self.source) and cache is None:
            raise DataError(f"{self.source}: a URL needs a cache; set data.cache_dir and data.cache_gb")
        self._cache = cache
        content = self._read_index()
        try:
            self.dataset: str = field(content, "dataset", is_text)
            self.split: str = field(content, "split", is_text)
            self.members_sha256: str = field(content, "members_sha256", is_sha256)
            self._missing_ids: list[int | str] | None = field(content, "missing_ids", is_ids_or_none)
            self.shards = self._open_shards(content)
        except KeyError as error:
            raise DataError(f"{self._file(INDEX)}: field {error} is missing or of another form; {REINDEX}") from error
        if check_files and not is_remote(self.source):
            self._check_files()
        self._tables: OrderedDict[int, Members] = OrderedDict()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._table_file: int | None = None
        self._owner = os.getpid()

    @property
    def missing_ids(self) -> list[int | str]:
        """Of the entries that the split has and the shards do not, for version 2 of the list next to the split.

        Raises:
            DataError: that list cannot be read.
        """
        if self._missing_ids is not None:
            return self._missing_ids
        return [] if is_remote(self.source) else rejected_ids(Path(self.source), self.split)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the shards and their order, the same for an index of any version."""
        return self.shards.fingerprint()

    @property
    def num_samples(self) -> int:
        """Number of samples of all shards."""
        return int(self.samples_per_shard.sum())

    @property
    def samples_per_shard(self) -> np.ndarray:
        """[shards] number of samples of each shard."""
        return self.shards.num_samples

    @property
    def counts_kinds(self) -> bool:
        """Whether the items of each kind are counted by themselves, as from version 3 on."""
        return self.shards.counts_kinds

    def items_per_shard(self, kind: str) -> np.ndarray:
        """[shards] number of items of a kind, such as ``questions``, of each shard."""
        return self.shards.num_items(kind)

    def key(self, shard: int, sample: int) -> str:
        """A sample's key."""
        return self._members(shard).key(sample)

    def item(self, kind: str, shard: int, item: int) -> tuple[int, int]:
        """The sample an item of a shard belongs to, and the item's number in that sample."""
        return self._members(shard).item(kind, item)

    def check_uncounted(self, kind: str) -> list[str]:
        """Read the samples of which an index of version 2 counts no item; they may have some after another kind.

        Returns:
            Those whose ``json`` cannot be read, as ``TAR: KEY``. From version 3 on, such a sample counts as an item.

        Raises:
            DataError: one has items of `kind`, or a shard cannot be read.
        """
        unreadable = []
        for shard in range(0 if self.counts_kinds else len(self.shards)):
            for sample in (self._members(shard).num_items == 0).nonzero()[0].tolist():
                content = self.read(shard, sample, ("json",)).get("json", b"{}")
                try:
                    content_of({"json": content})
                except BadSampleError:
                    unreadable.append(f"{self.shards[shard].name}: {self.key(shard, sample)}")
                else:
                    self.check_items(kind, shard, sample, count_items(content)[COUNTED_KINDS.index(kind)])
        return unreadable

    def check_items(self, kind: str, shard: int, sample: int, count: int) -> None:
        """Compare the number of items that a sample has with the number that was indexed.

        Raises:
            DataError: they differ, and units of reading would be missing.
        """
        indexed = self._members(shard).items_of(kind, sample)
        if indexed != count:
            raise DataError(
                f"{self._file(INDEX)}: counts {indexed} {kind} of sample {self.key(shard, sample)} of "
                f"{self.shards[shard].name}, which has {count}; {REINDEX}"
            )

    def without(self, kind: str) -> tuple[list[str], int]:
        """Those of `probes` that lack an image or a `kind` (``captions`` and so on), with reasons; the number of all.

        Raises:
            DataError: a shard cannot be read.
        """
        units = self.probes()
        lacks = [
            (unit, lack_of(kind, self.read(unit.shard, unit.unit, ("json", "txt"))))
            if self._members(unit.shard).parts()[0][unit.unit]
            else (unit, NO_IMAGE)
            for unit in units
        ]
        return [f"{self.key(unit.shard, unit.unit)} {reason}" for unit, reason in lacks if reason], len(units)

    def probes(self) -> list[Unit]:
        """Some samples of all shards; of the first ones alone where shards would have to be copied for it."""
        ends = np.cumsum(self.samples_per_shard)
        reach = len(ends) if self._cache is None else int(np.searchsorted(ends, _NUM_PROBES)) + 1
        order = SequentialOrder(self.samples_per_shard[:reach])
        positions = np.unique(np.linspace(0, order.num_units - 1, _NUM_PROBES, dtype=np.int64))
        return [order[position] for position in positions.tolist()] if order.num_units else []

    def read(self, shard: int, sample: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """A sample's members by extension, such as ``{"jpg": ..., "json": ...}``.

        Args:
            only: extensions to read, where not all are needed.

        Raises:
            DataError: the shard cannot be read.
        """
        try:
            members = self._members(shard)
            descriptor = self._descriptor(shard)
            return {
                # pread leaves no file position behind, so forked workers can share a descriptor.
                extension: os.pread(descriptor, int(members.sizes[sample, column]), int(offset))
                for column, extension in enumerate(members.extensions)
                if (offset := members.offsets[sample, column]) >= 0 and (only is None or extension in only)
            }
        except OSError as error:
            where = error.filename or self._file(self.shards[shard].name)
            raise DataError(
                f"{where}: cannot be read ({error.strerror}); check the file and its file system"
            ) from error

    def close(self) -> None:
        """Close the open files; the next read opens them again."""
        self._forget_parents()
        for descriptor in (*self._open.values(), *([] if self._table_file is None else [self._table_file])):
            os.close(descriptor)
        self._open.clear()
        self._table_file = None

    def _file(self, name: str) -> str:
        return f"{self.source.rstrip('/')}/{name}"

    def _read_index(self) -> dict[str, Any]:
        path = self._file(INDEX)
        try:
            if self._cache is not None and is_remote(self.source):
                text = self._cache.read(INDEX, limit=2**30)
            else:
                text = Path(path).read_bytes()
            content: dict[str, Any] = json.loads(text)
        except OSError as error:
            inside = sorted(folder.parent.name for folder in Path(self.source).glob(f"*/{INDEX}"))
            hint = f"name one of its splits, {', '.join(inside)}, or" if inside else "name a folder of shards, or"
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); {hint} make shards with python -m pretrain.prepare_shards"
            ) from error
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON ({error}); {REINDEX}") from error
        check_version(path, content, _READABLE, REINDEX, DataError)
        return content

    def _open_shards(self, content: dict[str, Any]) -> Shards:
        """The shards by ``index.shards``, which is compared with its checksum; of older versions by ``index.json``.

        Raises:
            KeyError: a field is missing or of another form.
            DataError: ``index.shards`` is missing or damaged.
        """
        if content["version"] < VERSION:
            return Shards(records_of_entries(content))
        num_bytes, sha256 = field(content, "shards_bytes", is_count), field(content, "shards_sha256", is_sha256)
        path = self._file(SHARDS)
        try:
            with os.fdopen(self._open_shards_file(num_bytes, sha256), "rb") as file:
                if error := _size_error(os.fstat(file.fileno()).st_size, num_bytes):
                    raise DataError(f"{path}: {error}; copy the folder again, or {REINDEX}")
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise DataError(
                        f"{path}: is not the one {INDEX} was written with; copy the folder again, or {REINDEX}"
                    )
                file.seek(0)
                return Shards(map_records(file))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; copy the folder again, or {REINDEX}") from error
        except ValueError as error:
            raise DataError(f"{path}: is no list of shards ({error}); {REINDEX}") from error

    def _check_files(self) -> None:
        sizes = self.shards.sizes(checked_shards(len(self.shards))) | {MEMBERS: self.shards.members_bytes}
        for name, num_bytes in sizes.items():
            path = self._file(name)
            try:
                state = Path(path).stat()
                size = state.st_size if stat.S_ISREG(state.st_mode) else None
            except OSError:  # also of a name that is too long
                size = None
            if error := "is missing" if size is None else _size_error(size, num_bytes):
                raise DataError(f"{path}: {error}; copy the folder again, or {REINDEX}")

    def _forget_parents(self) -> None:
        """A forked worker opens its own files, and does not close its parent's."""
        if os.getpid() != self._owner:
            self._open.clear()
            self._table_file = None
            self._owner = os.getpid()

    def _members(self, number: int) -> Members:
        if number in self._tables:
            self._tables.move_to_end(number)
            return self._tables[number]
        self._forget_parents()
        shard = self.shards[number]
        content = self._read_table(shard)
        if hashlib.sha256(content).hexdigest() != shard.table_sha256:
            raise DataError(
                f"{self._file(MEMBERS)}: is not the one {INDEX} was written with (table of {shard.name}); copy the "
                f"folder again, or {REINDEX}"
            )
        members = Members.from_bytes(content)
        num_items = members.num_items.sum(axis=0).tolist()
        counts = num_items if isinstance(num_items, int) else dict(zip(COUNTED_KINDS, num_items, strict=True))
        if (shard.num_samples, shard.num_items) != (len(members.key_ends), counts):
            raise DataError(f"{self._file(INDEX)}: the counts of {shard.name} are not those of its table; {REINDEX}")
        if len(self._tables) == _MAX_TABLES:
            self._tables.popitem(last=False)
        self._tables[number] = members
        return self._tables[number]

    def _read_table(self, shard: Shard) -> bytes:
        """A shard's part of ``index.members``; of a URL, only the tables of the shards in use are copied."""
        if self._cache is not None and is_remote(self.source):
            copy = self._cache.open(MEMBERS, shard.table_bytes, shard.table_sha256, shard.table_offset)
            with os.fdopen(copy, "rb") as file:
                return file.read()
        if self._table_file is None:
            self._table_file = os.open(self._file(MEMBERS), os.O_RDONLY)
        return os.pread(self._table_file, shard.table_bytes, shard.table_offset)

    def _open_shards_file(self, num_bytes: int, sha256: str) -> int:
        if self._cache is not None and is_remote(self.source):
            return self._cache.open(SHARDS, num_bytes, sha256)
        return os.open(self._file(SHARDS), os.O_RDONLY)

    def _descriptor(self, number: int) -> int:
        self._forget_parents()
        if number not in self._open:
            if len(self._open) == MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            shard = self.shards[number]
            if self._cache is not None:
                descriptor = self._cache.open(shard.name, shard.num_bytes, shard.sha256)
            else:
                descriptor = os.open(self._file(shard.name), os.O_RDONLY)
            problem = self._error_of(descriptor, number) or _size_error(os.fstat(descriptor).st_size, shard.num_bytes)
            if problem:
                os.close(descriptor)
                raise DataError(f"{self._file(shard.name)}: is not the tar that was indexed: {problem}; {REINDEX}")
            self._open[number] = descriptor
        self._open.move_to_end(number)
        return self._open[number]

    def _error_of(self, descriptor: int, number: int) -> str:
        """Why the shard's last member does not begin at the offset in its table, or is not the last; else empty."""
        members = self._members(number)
        if not members.offsets.size:
            return ""
        row, column = divmod(int(members.offsets.argmax()), len(members.extensions))
        offset, size = int(members.offsets[row, column]), int(members.sizes[row, column])
        name = f"{members.key(row)}.{members.extensions[column]}"
        problem = header_error(os.pread(descriptor, 512, offset - 512), size)
        if problem:
            return f"{name} of {size} bytes should begin at byte {offset}, but {problem}"
        if not self.counts_kinds:
            with open(descriptor, "rb", closefd=False) as file:
                return MORE_FOLLOWS if another_tar_follows(file, offset + size + -size % 512) else ""
        return ""


def checked_shards(num_shards: int) -> list[int]:
    """Numbers of the shards that are looked at when an index is opened: all, or of many some that are spread evenly."""
    return np.linspace(0, num_shards - 1, min(num_shards, _NUM_CHECKED), dtype=np.int64).tolist()


def _size_error(num_bytes: int, indexed: int) -> str:
    return "" if num_bytes == indexed else f"has {num_bytes} bytes, its index has {indexed}"


def source_names(indexes: Sequence[ShardIndex]) -> list[str]:
    """A short name of each source, for metrics: its data set, with the split and a number where that is needed."""
    names: list[str] = []
    for index in indexes:
        same = [other for other in indexes if other.dataset == index.dataset]
        name = index.dataset if len(same) == 1 else f"{index.dataset}_{index.split}"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def rejected_ids(folder: Path, split: str) -> list[int | str]:
    """Ids of a split's entries in the list of rejected records next to its folder; keys where it has no ids.

    Raises:
        DataError: the list cannot be read.
    """
    path = folder.parent / REJECTS
    if not path.is_file():
        return []
    try:
        rejects = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [
            identity
            for reject in rejects
            if reject["split"] == split
            for identity in reject.get("ids", [reject["key"]])
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DataError(f"{path}: is no list of rejected records ({error!r}); prepare the shards again") from error


def is_index(folder: Path) -> bool:
    """Whether a folder has an ``index.json`` that `write_index` wrote, of any version."""
    try:
        content = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"version", "members_sha256"} <= content.keys()
