"""The shards of an index as records of fixed width: in ``index.shards``, which is memory-mapped.

Processes share the file's pages, so an index of millions of shards takes little memory of each, and opens at once.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html for the file, an array of one dimension.
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from unimo3.data.members import COUNTED_KINDS

MAX_COUNT = 2**53
"""Above what any file has, and low enough for sums and offsets."""
# Records that are looked at together: their copies stay small.
_NUM_AT_ONCE = 2**14


@dataclass(frozen=True)
class Shard:
    """One tar file, and its table of members in ``index.members``.

    Attributes:
        num_items: by kind; in an index of version 2 one number.
    """

    name: str
    num_bytes: int
    sha256: str
    num_samples: int
    num_items: dict[str, int] | int
    table_offset: int
    table_bytes: int
    table_sha256: str


class Shards:
    """The shards of an index, by number; nothing of a shard is read before it is asked for.

    Args:
        records: one a shard, of `record_dtype`.

    Attributes:
        num_samples: [shards] int64 samples of each.
        counts_kinds: whether the items of each kind are counted by themselves, as from version 3 on.
    """

    def __init__(self, records: np.ndarray):
        self._records = records
        self.num_samples = np.ascontiguousarray(records["num_samples"])
        self.counts_kinds = records["num_items"].ndim == 2

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        record = self._records[number]
        counts = record["num_items"].tolist()
        return Shard(
            name=os.fsdecode(record["name"]),
            num_bytes=int(record["num_bytes"]),
            sha256=record["sha256"].tobytes().hex(),
            num_samples=int(record["num_samples"]),
            num_items=dict(zip(COUNTED_KINDS, counts, strict=True)) if self.counts_kinds else counts,
            table_offset=int(record["table_offset"]),
            table_bytes=int(record["table_bytes"]),
            table_sha256=record["table_sha256"].tobytes().hex(),
        )

    def num_items(self, kind: str) -> np.ndarray:
        """[shards] int64 items of a kind of each; in an index of version 2, of the kind that was counted."""
        counts = self._records["num_items"]
        return np.ascontiguousarray(counts[:, COUNTED_KINDS.index(kind)] if self.counts_kinds else counts)

    def sizes(self, numbers: list[int]) -> dict[str, int]:
        """Bytes of some shards, by name."""
        records = self._records[numbers]
        return dict(zip(map(os.fsdecode, records["name"].tolist()), records["num_bytes"].tolist(), strict=True))

    @property
    def members_bytes(self) -> int:
        """Size of ``index.members``, which has the table of each."""
        return int(self._records["table_bytes"].sum())

    def fingerprint(self) -> str:
        """SHA-256 of the hexadecimal SHA-256 of all shards, one after the other."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _NUM_AT_ONCE):
            hashes = self._records["sha256"][start : start + _NUM_AT_ONCE].tobytes()
            digest.update(hashes.hex().encode())
        return digest.hexdigest()


def record_dtype(name_bytes: int, counts_kinds: bool = True) -> np.dtype:
    """The form of a record; the numbers come first.

    Args:
        name_bytes: room for a name, in bytes of the file system's encoding.
        counts_kinds: false: one number of items, as in an index of version 2.
    """
    count = "<i8"
    return np.dtype(
        [
            ("num_bytes", count),
            ("num_samples", count),
            ("num_items", count, (len(COUNTED_KINDS),) if counts_kinds else ()),
            ("table_offset", count),
            ("table_bytes", count),
            ("sha256", "V32"),
            ("table_sha256", "V32"),
            ("name", f"S{name_bytes}"),
        ]
    )


def records_of(shards: Iterable[Shard], counts_kinds: bool = True) -> np.ndarray:
    """The shards' records, in memory.

    Args:
        shards: taken one by one.
        counts_kinds: whether `num_items` is by kind.
    """
    names, numbers = [], bytearray()
    form = struct.Struct(f"<2q{len(COUNTED_KINDS) if counts_kinds else 1}q2q32s32s")
    for shard in shards:
        names.append(os.fsencode(shard.name))
        items = shard.num_items
        numbers += form.pack(
            shard.num_bytes,
            shard.num_samples,
            *([items] if isinstance(items, int) else [items[kind] for kind in COUNTED_KINDS]),
            shard.table_offset,
            shard.table_bytes,
            bytes.fromhex(shard.sha256),
            bytes.fromhex(shard.table_sha256),
        )
    # A multiple of 8, so that the numbers of all records are aligned.
    width = -(-max(map(len, names), default=1) // 8) * 8
    records = np.zeros(len(names), record_dtype(width, counts_kinds))
    fixed = np.frombuffer(numbers, [(name, *form) for name, *form in records.dtype.descr[:-1]])
    for field in fixed.dtype.names or ():
        records[field] = fixed[field]
    records["name"] = names
    return records


def write_records(file: BinaryIO, records: np.ndarray) -> None:
    """Write an ``index.shards``."""
    np.save(file, records, allow_pickle=False)


def map_records(file: BinaryIO) -> np.ndarray:
    """The records of an ``index.shards``, memory-mapped; the file may be closed.

    Raises:
        ValueError: the file is none, or a record cannot be right.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 1 or dtype != record_dtype(dtype.itemsize - record_dtype(0).itemsize):
        raise ValueError(f"its records are {dtype}")
    if shape == (0,):
        return np.zeros(shape, dtype)
    records = np.memmap(file, dtype, "r", file.tell(), shape).view(np.ndarray)
    for start in range(0, len(records), _NUM_AT_ONCE):
        if error := _error_of(records[start : start + _NUM_AT_ONCE]):
            raise ValueError(error)
    return records


def _error_of(records: np.ndarray) -> str:
    """What no writer writes, such as a name that leads out of the folder; empty if there is nothing."""
    for name in ("num_bytes", "num_samples", "num_items", "table_offset", "table_bytes"):
        if records[name].min() < 0 or records[name].max() > MAX_COUNT:
            return f"a {name} is below 0 or above {MAX_COUNT}"
    names = np.ascontiguousarray(records["name"]).view(np.uint8).reshape(len(records), -1)
    is_end = names == 0
    is_empty, is_continued = is_end[:, 0].any(), (is_end[:, :-1] > is_end[:, 1:]).any()
    is_parent = (names[:, 0] == ord(".")) & (names[:, 1] == ord(".")) & is_end[:, 2]
    if is_empty or is_continued or is_parent.any() or (names == ord("/")).any():
        return "a name is not that of a file"
    return ""
