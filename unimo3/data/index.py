"""The index of a folder of WebDataset shards: what is where, so that any sample is one seek away.

    FOLDER/000000.tar ...      samples ``key.jpg`` + ``key.json`` (or any members that share a key)
    FOLDER/index.json          version, dataset, split, each shard's name, bytes, sha256 and number of samples, and the
                               sha256 of index.npz
    FOLDER/index.npz           for each shard, every member's offset and size, and every sample's number of items

An item is a caption or a question of a sample's ``json``.

Source: https://github.com/webdataset/webdataset for the shards' layout; the tar format of POSIX.1-1988.
"""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimo3.errors import DataError

VERSION = 1
_MAX_OPEN_SHARDS = 16


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class _Members:
    """A shard's members: one row a sample, one column an extension (-1 where a sample lacks it)."""

    keys: np.ndarray
    extensions: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    num_items: np.ndarray


def build_index(folder: Path, dataset: str, split: str) -> None:
    """Scan a folder's tars, ours or anybody's, and write ``index.json`` and ``index.npz`` beside them.

    Raises:
        DataError: there are no tars, one cannot be read, or one holds no samples.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: no .tar files there; an index needs at least one shard")
    shards: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for number, path in enumerate(paths):
        members = _scan(path)
        shards.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
                "num_samples": len(members.keys),
            }
        )
        arrays |= {
            f"{number}_keys": members.keys,
            f"{number}_extensions": np.asarray(members.extensions),
            f"{number}_offsets": members.offsets,
            f"{number}_sizes": members.sizes,
            f"{number}_num_items": members.num_items,
        }
    staging = folder / "index.npz.tmp"
    _save_arrays(arrays, staging)
    content = {
        "version": VERSION,
        "dataset": dataset,
        "split": split,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "num_items": int(sum(arrays[f"{number}_num_items"].sum() for number in range(len(shards)))),
        "members_sha256": _sha256(staging),
        "shards": shards,
    }
    staging.replace(folder / "index.npz")
    # Last: a folder with an index.json is whole.
    staging = folder / "index.json.tmp"
    staging.write_text(json.dumps(content, indent=1) + "\n")
    staging.replace(folder / "index.json")


class ShardIndex:
    """An index, loaded; reads samples by offset, from any process.

    Args:
        folder: with ``index.json``.

    Raises:
        DataError: the index or a shard is missing, a shard has another size than was indexed, or the two files of the
            index do not belong together.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "index.json"
        content = _read_json(path)
        try:
            self.dataset: str = content["dataset"]
            self.split: str = content["split"]
            self.shards = [
                Shard(entry["name"], entry["bytes"], entry["sha256"], entry["num_samples"])
                for entry in content["shards"]
            ]
            members_sha256: str = content["members_sha256"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: field {error} is missing or of another form; prepare the shards again") from error
        for shard in self.shards:
            path = folder / shard.name
            found = path.stat().st_size if path.is_file() else None
            if found != shard.num_bytes:
                state = "is missing" if found is None else f"has {found} bytes, its index says {shard.num_bytes}"
                raise DataError(f"{path}: {state}; prepare the shards again with python -m pretrain.prepare_shards")
        self.fingerprint = hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()
        members_path = folder / "index.npz"
        if not members_path.is_file() or _sha256(members_path) != members_sha256:
            raise DataError(
                f"{members_path}: is missing or not the one index.json was written with; copy the folder again, or "
                "prepare the shards again"
            )
        with np.load(members_path) as arrays:
            self._members = [
                _Members(
                    arrays[f"{number}_keys"],
                    arrays[f"{number}_extensions"].tolist(),
                    arrays[f"{number}_offsets"],
                    arrays[f"{number}_sizes"],
                    arrays[f"{number}_num_items"],
                )
                for number in range(len(self.shards))
            ]
        self._open: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    @property
    def samples_per_shard(self) -> list[int]:
        """Number of samples of each shard."""
        return [shard.num_samples for shard in self.shards]

    @property
    def items_per_shard(self) -> list[int]:
        """Number of items of each shard."""
        return [int(members.num_items.sum()) for members in self._members]

    def key(self, shard: int, sample: int) -> str:
        """A sample's key."""
        return str(self._members[shard].keys[sample])

    def item(self, shard: int, item: int) -> tuple[int, int]:
        """The sample an item of a shard belongs to, and the item's number in that sample."""
        ends = np.cumsum(self._members[shard].num_items)
        sample = int(np.searchsorted(ends, item, side="right"))
        return sample, int(item - (0 if sample == 0 else ends[sample - 1]))

    def holds(self, kind: str) -> bool:
        """Whether the first sample's ``json`` has entries under `kind`: ``captions`` or ``questions``."""
        try:
            content = json.loads(self.read(0, 0).get("json", b"{}"))
        except ValueError:
            return False
        return isinstance(content, dict) and bool(content.get(kind))

    def read(self, shard: int, sample: int) -> dict[str, bytes]:
        """A sample's members by extension, such as ``{"jpg": ..., "json": ...}``."""
        members = self._members[shard]
        descriptor = self._descriptor(shard)
        found = {}
        for column, extension in enumerate(members.extensions):
            offset, size = int(members.offsets[sample, column]), int(members.sizes[sample, column])
            if offset >= 0:
                # pread leaves no file position behind, so forked workers can share a descriptor.
                found[extension] = os.pread(descriptor, size, offset)
        return found

    def _descriptor(self, shard: int) -> int:
        if os.getpid() != self._owner:
            self._open.clear()  # a forked worker opens its own, and does not close its parent's
            self._owner = os.getpid()
        if shard not in self._open:
            if len(self._open) == _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.folder / self.shards[shard].name, os.O_RDONLY)
        self._open.move_to_end(shard)
        return self._open[shard]


def index_faults(name: str, folder: str | None, kind: str) -> list[str]:
    """Say why a folder's shards cannot serve as setting `name`, which needs samples with `kind`, one line a fault."""
    if folder is None:
        return []
    if not folder:
        return [f"{name}: '': no folder is named; make shards with python -m pretrain.prepare_shards"]
    try:
        index = ShardIndex(Path(folder))
    except DataError as error:
        return [f"{name}: '{folder}': {error}"]
    if not index.holds(kind):
        return [f"{name}: '{folder}': its samples have no {kind} ({index.dataset}, {index.split}); name other shards"]
    return []


def _read_json(path: Path) -> dict:
    try:
        content: dict = json.loads(path.read_text())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); make shards with python -m pretrain.prepare_shards"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON ({error}); prepare the shards again") from error
    found = content.get("version") if isinstance(content, dict) else None
    if found != VERSION:
        raise DataError(f"{path}: version {found!r}, this program reads {VERSION}; index it again")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    """As ``np.savez``, which would write the time of day into the file: equal shards give an equal index."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def _scan(path: Path) -> _Members:
    samples: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
    num_items: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = folder + slash + stem
                samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
                if extension == "json":
                    file = tar.extractfile(member)
                    num_items[key] = _count_items(file.read()) if file else 0
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: is no readable tar ({error}); make or copy it again") from error
    if not samples:
        raise DataError(f"{path}: holds no samples; remove it or make it again")
    extensions = sorted({extension for members in samples.values() for extension in members})
    offsets = np.full((len(samples), len(extensions)), -1, dtype=np.int64)
    sizes = np.zeros_like(offsets)
    for row, members in enumerate(samples.values()):
        for extension, (offset, size) in members.items():
            column = extensions.index(extension)
            offsets[row, column], sizes[row, column] = offset, size
    items = np.asarray([num_items.get(key, 0) for key in samples], dtype=np.int64)
    return _Members(np.asarray(list(samples)), extensions, offsets, sizes, items)


def _count_items(content: bytes) -> int:
    try:
        described = json.loads(content)
    except ValueError:
        return 0
    if not isinstance(described, dict):
        return 0
    return len(described.get("captions") or described.get("questions") or [])
