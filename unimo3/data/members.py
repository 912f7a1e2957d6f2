"""The table of the members of a tar of samples: their offsets and sizes, in memory and as bytes.

Source: the tar format of POSIX.1-1988; https://github.com/webdataset/webdataset for keys and extensions.
"""

import hashlib
import io
import json
import logging
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unimo3.data.tar_members import tar_members
from unimo3.errors import DataError

COUNTED_KINDS = ("captions", "questions", "hypotheses")
"""Lists of a sample's ``json`` whose entries are its items, each kind by itself."""

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# The extensions that any task reads; those with a number are of a pair of images.
_READ = frozenset(
    ["json", "txt", *IMAGE_EXTENSIONS, *(f"{number}.{name}" for number in range(2) for name in IMAGE_EXTENSIONS)]
)
_DOTS = (
    "a sample's key ends at the first dot of a name; where keys contain dots, rename the files and make the tar again"
)


@dataclass(frozen=True)
class Members:
    """A shard's members: one row a sample, one column an extension (-1 where a sample lacks it).

    Attributes:
        keys: [samples] UTF-8 bytes.
        offsets: [samples, extensions] of the members' content.
        num_items: [samples, kinds] items of each of `COUNTED_KINDS` in the samples' ``json``; [samples] in tables of
            version 2, which count the first of these kinds that a ``json`` has.
    """

    keys: np.ndarray
    extensions: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    num_items: np.ndarray
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.ascontiguousarray(np.cumsum(self.num_items, axis=0).T))

    def key(self, sample: int) -> str:
        """A sample's key; bytes that are no UTF-8 as escapes, such as ``\\udce9``."""
        key = bytes(self.keys[sample]).decode("utf-8", "surrogateescape")
        return key.encode("utf-8", "backslashreplace").decode()

    def item(self, kind: str, item: int) -> tuple[int, int]:
        """The sample an item of a kind belongs to, and the item's number in that sample."""
        ends = self._ends if self._ends.ndim == 1 else self._ends[COUNTED_KINDS.index(kind)]
        sample = int(np.searchsorted(ends, item, side="right"))
        return sample, int(item - (0 if sample == 0 else ends[sample - 1]))

    def items_of(self, kind: str, sample: int) -> int:
        """Number of a sample's items of a kind."""
        counts = self.num_items[sample]
        return int(counts if counts.ndim == 0 else counts[COUNTED_KINDS.index(kind)])

    def to_bytes(self) -> bytes:
        """The table for `from_bytes`; equal members give equal bytes."""
        # As np.savez, which would write the time of day as well.
        archive = io.BytesIO()
        arrays = {name: getattr(self, name) for name in ("keys", "offsets", "sizes", "num_items")}
        with zipfile.ZipFile(archive, "w") as file:
            for name, array in (arrays | {"extensions": np.asarray(self.extensions, dtype=np.str_)}).items():
                content = io.BytesIO()
                np.lib.format.write_array(content, array, allow_pickle=False)
                file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
        return archive.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Members":
        """The members that `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(
                arrays["keys"],
                arrays["extensions"].tolist(),
                arrays["offsets"],
                arrays["sizes"],
                arrays["num_items"],
            )


def scan(path: Path) -> Members:
    """Read the headers of a tar, or of several that were joined to one file; one without a sample has no rows.

    A member that no task reads has no column, so the table is linear in the number of members. Members that look as
    if they should be read are counted in the log.

    Raises:
        DataError: it is no tar that can be read from its beginning to its end, or no member of its samples is read.
    """
    samples = _Samples(path)
    for file, member in tar_members(path):
        samples.add(file, member)
    return samples.table()


class _Samples:
    """The samples of a tar, of its members in their order."""

    def __init__(self, path: Path):
        self._path = path
        self._keys: list[str] = []
        self._members: list[dict[str, tuple[int, int]]] = []
        self._num_items: list[list[int]] = []
        self._latest: dict[str, int] = {}
        self._unread: Counter[str] = Counter()
        self._first_unread: dict[str, str] = {}

    def add(self, file: BinaryIO, member: tarfile.TarInfo) -> None:
        """Take a member to its sample.

        Args:
            file: to read its content from.

        Raises:
            DataError: its content is not in one piece.
        """
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        # Of no sample, as webdataset has it: names that begin with a dot or two underscores.
        if member.isdir() or not stem or stem.startswith("__"):
            return
        if not member.isfile() or not extension:
            self._skip(member, "it is a link or a device" if extension else "its name has no ending")
            return
        key, extension = folder + slash + stem, extension.lower()
        if member.issparse() and extension in _READ:
            raise DataError(
                f"{self._path}: member {member.name!r} is stored without its zeros; make the tar without --sparse (-S)"
            )
        if key not in self._latest or extension in self._members[self._latest[key]]:
            self._latest[key] = len(self._keys)  # a key that comes again is another sample
            self._keys.append(key)
            self._members.append({})
            self._num_items.append([0] * len(COUNTED_KINDS))
        row = self._latest[key]
        self._members[row][extension] = (member.offset_data, member.size)
        if extension == "json":
            file.seek(member.offset_data)
            self._num_items[row] = count_items(file.read(member.size))
        elif extension not in _READ and extension.rpartition(".")[2] in _READ:
            self._skip(member, _DOTS)

    def table(self) -> Members:
        """The table of all samples.

        Raises:
            DataError: there are samples, and no member of them is read.
        """
        columns = sorted({name for members in self._members for name in members.keys() & _READ})
        if self._keys and not columns:
            raise DataError(
                f"{self._path}: no member of its {len(self._keys)} samples is read, such as {self._keys[0]!r} with the "
                f"ending {next(iter(self._members[0]))!r}; {', '.join((*IMAGE_EXTENSIONS, 'json', 'txt'))} are, and "
                f"{_DOTS}"
            )
        for reason, count in self._unread.items():
            first = self._first_unread[reason]
            log.warning("%s: %d members are not read, such as %r: %s", self._path, count, first, reason)
        offsets = np.full((len(self._keys), len(columns)), -1, dtype=np.int64)
        sizes = np.zeros_like(offsets)
        for row, members in enumerate(self._members):
            for column, extension in enumerate(columns):
                if extension in members:
                    offsets[row, column], sizes[row, column] = members[extension]
        return Members(
            np.asarray([key.encode("utf-8", "surrogateescape") for key in self._keys], dtype=np.bytes_),
            columns,
            offsets,
            sizes,
            np.asarray(self._num_items, dtype=np.int64).reshape(len(self._keys), len(COUNTED_KINDS)),
        )

    def _skip(self, member: tarfile.TarInfo, reason: str) -> None:
        self._unread[reason] += 1
        self._first_unread.setdefault(reason, member.name)


def header_error(header: bytes, size: int) -> str:
    """Why the 512 bytes before a member's content are not its tar header; empty if they are.

    Args:
        size: indexed size of the member.
    """
    try:
        actual = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return "no member begins there"
    return "" if actual == size else f"a member of {actual} bytes begins there"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_items(content: bytes) -> list[int]:
    """Items of each kind; what cannot be read counts as one, so that a reader meets the error and reports it."""
    try:
        described: Any = json.loads(content)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        return [1] * len(COUNTED_KINDS)
    values = [described.get(kind) for kind in COUNTED_KINDS]
    return [len(value) if isinstance(value, list) else int(value is not None) for value in values]
