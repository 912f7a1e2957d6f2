"""The table of the members of a tar of samples: their offsets and sizes, in memory and as bytes.

Source: the tar format of POSIX.1-1988; https://github.com/webdataset/webdataset for keys and extensions.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimo3.errors import DataError

COUNTED_KINDS = ("captions", "questions", "hypotheses")
"""Lists of a sample's ``json`` whose entries are its items, each kind by itself."""
_BLOCK_BYTES = 512


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
        """A sample's key."""
        return bytes(self.keys[sample]).decode("utf-8", "replace")

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
    """Read the headers of a tar; one without a sample has no rows.

    Raises:
        DataError: it is no tar that can be read from its beginning to its end.
    """
    samples: list[dict[str, tuple[int, int]]] = []
    keys: list[str] = []
    num_items: list[list[int]] = []
    latest: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + member.size
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                # Of no sample, as webdataset has it: names that begin with a dot or two underscores, or have no ending.
                if not stem or not extension or stem.startswith("__"):
                    continue
                key, extension = folder + slash + stem, extension.lower()
                if key not in latest or extension in samples[latest[key]]:
                    latest[key] = len(samples)  # a key that comes again is another sample
                    samples.append({})
                    keys.append(key)
                    num_items.append([0] * len(COUNTED_KINDS))
                samples[latest[key]][extension] = (member.offset_data, member.size)
                if extension == "json":
                    file = tar.extractfile(member)
                    num_items[latest[key]] = count_items(file.read() if file else b"{}")
        with path.open("rb") as raw:
            # A tar ends in blocks of zeros. Python's reader accepts any end between two members.
            raw.seek(-(-end // _BLOCK_BYTES) * _BLOCK_BYTES)
            if raw.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
                raise DataError(f"{path}: is cut off after {len(samples)} samples; copy it again")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: is no readable tar ({error}); make or copy it again") from error
    extensions = sorted({extension for members in samples for extension in members})
    offsets = np.full((len(samples), len(extensions)), -1, dtype=np.int64)
    sizes = np.zeros_like(offsets)
    for row, members in enumerate(samples):
        for extension, (offset, size) in members.items():
            column = extensions.index(extension)
            offsets[row, column], sizes[row, column] = offset, size
    return Members(
        np.asarray([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_),
        extensions,
        offsets,
        sizes,
        np.asarray(num_items, dtype=np.int64).reshape(len(samples), len(COUNTED_KINDS)),
    )


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
