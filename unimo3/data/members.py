"""The table of the members of a tar of samples: their offsets and sizes, in memory and as bytes.

Source: the tar format of POSIX.1-1988; https://github.com/webdataset/webdataset for keys and extensions.
"""

import hashlib
import io
import json
import logging
import operator
import re
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

# The first of these is read where a sample has several images.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp"),
    *("jfif", "gif", "bmp", "tif", "tiff", "avif", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm"),
)
_NO_SAMPLE = re.compile(r"(^|/)__[^/]*__($|/)")
# The extensions that any task reads; those with a number are of a pair of images.
_READ = frozenset(
    ["json", "txt", *IMAGE_EXTENSIONS, *(f"{number}.{name}" for number in range(2) for name in IMAGE_EXTENSIONS)]
)
_IMAGES = ("jpg", "0.jpg", "1.jpg")
_TEXTS = ("json", "txt")
_DOTS = (
    "a sample's key ends at the first dot of a name; where keys contain dots, rename the files and make the tar again"
)


@dataclass(frozen=True)
class Members:
    """A shard's members: one row a sample, one column an extension (-1 where a sample lacks it).

    Attributes:
        key_bytes: [bytes] of all keys, one after the other, as UTF-8.
        key_ends: [samples] where each key ends in `key_bytes`.
        offsets: [samples, extensions] of the members' content.
        num_items: [samples, kinds] items of each of `COUNTED_KINDS` in the samples' ``json``; [samples] in tables of
            version 2, which count the first of these kinds that a ``json`` has.
    """

    key_bytes: np.ndarray
    key_ends: np.ndarray
    extensions: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    num_items: np.ndarray
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.ascontiguousarray(np.cumsum(self.num_items, axis=0).T))

    def key(self, sample: int) -> str:
        """A sample's key; bytes that are no UTF-8 as escapes, such as ``\\udce9``."""
        return self._key(sample).decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()

    @property
    def keys(self) -> list[bytes]:
        """The keys of all samples."""
        return [self._key(sample) for sample in range(len(self.key_ends))]

    def _key(self, sample: int) -> bytes:
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_bytes[start : int(self.key_ends[sample])].tobytes()

    def item(self, kind: str, item: int) -> tuple[int, int]:
        """The sample an item of a kind belongs to, and the item's number in that sample."""
        ends = self._ends if self._ends.ndim == 1 else self._ends[COUNTED_KINDS.index(kind)]
        sample = int(np.searchsorted(ends, item, side="right"))
        return sample, int(item - (0 if sample == 0 else ends[sample - 1]))

    def items_of(self, kind: str, sample: int) -> int:
        """Number of a sample's items of a kind."""
        counts = self.num_items[sample]
        return int(counts if counts.ndim == 0 else counts[COUNTED_KINDS.index(kind)])

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """[samples] whether each has an image or a pair of images, and whether it has a ``json`` or a ``txt``."""
        roles = np.asarray([_role(extension) for extension in self.extensions], dtype=np.str_)
        has = {role: np.any(self.offsets[:, roles == role] >= 0, axis=1) for role in (*_IMAGES, *_TEXTS)}
        image, first, second = (np.asarray(has[role]) for role in _IMAGES)
        return image | (first & second), np.any([has[role] for role in _TEXTS], axis=0)

    def to_bytes(self) -> bytes:
        """The table for `from_bytes`; equal members give equal bytes."""
        # As np.savez, which would write the time of day as well.
        archive = io.BytesIO()
        arrays = {name: getattr(self, name) for name in ("key_bytes", "key_ends", "offsets", "sizes", "num_items")}
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
            # Earlier, every key had the width of the longest.
            if "keys" in arrays:
                key_bytes, key_ends = _joined(arrays["keys"].tolist())
            else:
                key_bytes, key_ends = arrays["key_bytes"], arrays["key_ends"]
            return cls(
                key_bytes,
                key_ends,
                arrays["extensions"].tolist(),
                arrays["offsets"],
                arrays["sizes"],
                arrays["num_items"],
            )


def _joined(keys: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """`key_bytes` and `key_ends` of `Members`."""
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return np.frombuffer(b"".join(keys), dtype=np.uint8), ends


def scan(path: Path) -> Members:
    """Read the headers of a tar, or of several that were joined to one file; one without a sample has no rows.

    A member that no task reads has no column, so the table is linear in the number of members. Members that look as
    if they should be read are counted in the log.

    Raises:
        DataError: it is no tar that can be read from its beginning to its end, no member of its samples is read, or
            none of its images has a text.
    """
    samples = _Samples(path)
    for file, part, member in tar_members(path):
        samples.add(file, part, member)
    return samples.table()


@dataclass
class _Sample:
    """A sample's members.

    Attributes:
        part: number of the joined tar.
        members: offset and size by extension.
        roles: what its members are for a sample, which needs one of each.
        num_items: of each of `COUNTED_KINDS`.
    """

    key: str
    part: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    roles: set[str] = field(default_factory=set)
    num_items: list[int] = field(default_factory=lambda: [0] * len(COUNTED_KINDS))

    def add(self, extension: str, offset: int, size: int) -> None:
        """Add a member."""
        self.members[extension] = (offset, size)
        self.roles.add(_role(extension))

    @property
    def has_image(self) -> bool:
        """Whether it has an image, or both of a pair."""
        return "jpg" in self.roles or self.roles.issuperset(_IMAGES[1:])

    def take(self, other: "_Sample") -> None:
        """Add the members of another."""
        self.members |= other.members
        self.roles |= other.roles
        self.num_items = [sum(counts) for counts in zip(self.num_items, other.num_items, strict=True)]


def _role(extension: str) -> str:
    """The extension; of an image any of `_IMAGES`, whatever its format."""
    number, dot, kind = extension.rpartition(".")
    return f"{number}{dot}jpg" if kind in IMAGE_EXTENSIONS and extension in _READ else extension


class _Samples:
    """The samples of a tar, of its members in their order.

    Neighbours with one key are a sample, as in webdataset. A key that comes again in the same tar continues its sample
    if that has no member of the same role: so are tars whose images come first and whose texts come later. Otherwise,
    and in another joined tar, it is another sample.
    """

    def __init__(self, path: Path):
        self._path = path
        self._samples: list[_Sample] = []
        self._latest: dict[str, _Sample] = {}
        self._open: _Sample | None = None
        self._apart: dict[int, str] = {}
        self._unread: Counter[str] = Counter()
        self._first_unread: dict[str, str] = {}

    def add(self, file: BinaryIO, part: int, member: tarfile.TarInfo) -> None:
        """Take a member to its sample.

        Args:
            file: to read its content from.
            part: number of the joined tar.

        Raises:
            DataError: its content is not in one piece.
        """
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if member.isdir():
            return
        # As in webdataset.
        if not stem or _NO_SAMPLE.search(f"{folder}/{stem}"):
            self._skip(member.name, "its name begins with a dot, or is __enclosed__ by two underscores")
            return
        if not member.isfile() or not extension:
            self._skip(member.name, "it is a link or a device" if extension else "its name has no ending")
            return
        key, extension = folder + slash + stem, extension.lower()
        if member.issparse() and extension in _READ:
            raise DataError(
                f"{self._path}: member {member.name!r} is stored without its zeros; make the tar without --sparse (-S)"
            )
        sample = self._open
        if sample is None or (sample.key, sample.part) != (key, part) or extension in sample.members:
            self._close()
            sample = self._open = _Sample(key, part)
        sample.add(extension, member.offset_data, member.size)
        if extension == "json":
            file.seek(member.offset_data)
            sample.num_items = count_items(file.read(member.size))
        elif extension not in _READ and extension.rpartition(".")[2] in _READ:
            self._skip(member.name, _DOTS)

    def _close(self) -> None:
        """Add the neighbours that were read last to the sample that they continue, or as another one."""
        sample, self._open = self._open, None
        if sample is None:
            return
        earlier = self._latest.get(sample.key)
        if earlier is not None and earlier.part == sample.part and earlier.roles.isdisjoint(sample.roles):
            earlier.take(sample)
            self._apart[id(earlier)] = sample.key
        else:
            self._samples.append(sample)
            self._latest[sample.key] = sample

    def table(self) -> Members:
        """The table of all samples.

        Raises:
            DataError: there are samples, and no member of them is read, or none has both an image and a text.
        """
        self._close()
        samples = self._samples
        columns = sorted({name for sample in samples for name in sample.members.keys() & _READ})
        if samples and not columns:
            raise DataError(
                f"{self._path}: no member of its {len(samples)} samples is read, such as {samples[0].key!r} with the "
                f"ending {next(iter(samples[0].members))!r}; {', '.join((*IMAGE_EXTENSIONS, 'json', 'txt'))} are, and "
                f"{_DOTS}"
            )
        self._check_pairs()
        self._count_other_images()
        for reason, count in self._unread.items():
            first = self._first_unread[reason]
            log.warning("%s: %d members are not read, such as %r: %s", self._path, count, first, reason)
        if self._apart:
            first = next(iter(self._apart.values()))
            message = "%s: the members of %d samples are not neighbours, such as %r; each key is taken for one sample"
            log.warning(message, self._path, len(self._apart), first)
        if lacking := [sample for sample in samples if not sample.has_image]:
            message = "%s: %d samples have no image, or one of a pair (%s), such as %r with the ending %r"
            first, ending = lacking[0].key, next(iter(lacking[0].members))
            log.warning(message, self._path, len(lacking), ", ".join(IMAGE_EXTENSIONS), first, ending)
        offsets = np.full((len(samples), len(columns)), -1, dtype=np.int64)
        sizes = np.zeros_like(offsets)
        for row, sample in enumerate(samples):
            for column, extension in enumerate(columns):
                if extension in sample.members:
                    offsets[row, column], sizes[row, column] = sample.members[extension]
        return Members(
            *_joined([sample.key.encode("utf-8", "surrogateescape") for sample in samples]),
            columns,
            offsets,
            sizes,
            np.asarray([sample.num_items for sample in samples], dtype=np.int64).reshape(-1, len(COUNTED_KINDS)),
        )

    def _check_pairs(self) -> None:
        """Refuse a tar whose images and texts are different samples.

        Raises:
            DataError: there are images and texts, and no sample has both.
        """
        roles = [sample.roles for sample in self._samples]
        has_image = [not names.isdisjoint(_IMAGES) for names in roles]
        has_text = [not names.isdisjoint(_TEXTS) for names in roles]
        if any(has_image) and any(has_text) and not any(map(operator.and_, has_image, has_text)):
            raise DataError(
                f"{self._path}: {sum(has_image)} samples have an image, such as "
                f"{self._samples[has_image.index(True)].key!r}, {sum(has_text)} have a json or a txt, such as "
                f"{self._samples[has_text.index(True)].key!r}, and none has both; give the members of a sample one "
                "key, and make the tar again with tar --sort=name"
            )

    def _count_other_images(self) -> None:
        """Count the images of samples that have another of the same role."""
        for sample in self._samples:
            if len(sample.roles) < len(sample.members):
                images = {name for name in sample.members if _role(name) in _IMAGES}
                for role in _IMAGES:
                    of_role = [role.replace("jpg", kind) for kind in IMAGE_EXTENSIONS]
                    for name in [name for name in of_role if name in images][1:]:
                        self._skip(f"{sample.key}.{name}", "its sample has another image, which is read")

    def _skip(self, name: str, reason: str) -> None:
        self._unread[reason] += 1
        self._first_unread.setdefault(reason, name)


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
