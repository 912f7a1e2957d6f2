"""Writes the index of a folder of tars; `unimo3.data.index` has its files.

Source: none.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unimo3.data.index import INDEX, MEMBERS, SHARDS, VERSION
from unimo3.data.members import COUNTED_KINDS, scan, sha256_of
from unimo3.data.shard_records import Shard, records_of, write_records
from unimo3.errors import DataError


@dataclass(frozen=True)
class ShardTable:
    """The entry of one tar in an index.

    Attributes:
        num_items: by kind.
        table: its `Members` as bytes.
    """

    name: str
    num_bytes: int
    sha256: str
    num_samples: int
    num_items: dict[str, int]
    table: bytes


def table_of(path: Path) -> ShardTable:
    """Read a tar once for its members and once for its checksum.

    Raises:
        DataError: it cannot be read.
    """
    members = scan(path)
    num_items = dict(zip(COUNTED_KINDS, members.num_items.sum(axis=0).tolist(), strict=True))
    content = members.to_bytes()
    return ShardTable(path.name, path.stat().st_size, sha256_of(path), len(members.key_ends), num_items, content)


def write_index(
    folder: Path, dataset: str, split: str, tables: Iterable[ShardTable], missing_ids: Sequence[int | str] = ()
) -> int:
    """Write a folder's index, ``index.json`` last: a folder with an index.json is complete.

    Args:
        tables: one a shard, taken one by one.
        missing_ids: of the entries that the split has and the shards do not.

    Returns:
        Number of samples.

    Raises:
        DataError: there is no sample in any of the shards.
    """
    staging = folder / f"{MEMBERS}.tmp"
    digest = hashlib.sha256()

    def written(file: BinaryIO) -> Iterator[Shard]:
        for table in tables:
            facts = (table.name, table.num_bytes, table.sha256, table.num_samples, table.num_items)
            yield Shard(*facts, file.tell(), len(table.table), hashlib.sha256(table.table).hexdigest())
            file.write(table.table)
            digest.update(table.table)

    with staging.open("wb") as file:
        records = records_of(written(file))
    if not records["num_samples"].any():
        staging.unlink()
        raise DataError(f"{folder}: its {len(records)} tars contain no samples; an index needs at least one")
    # In this order: an old index.json with new other files is detected by its checksums.
    staging.replace(folder / MEMBERS)
    return write_shards(folder, dataset, split, records, digest.hexdigest(), missing_ids)


def write_shards(
    folder: Path,
    dataset: str,
    split: str,
    records: np.ndarray,
    members_sha256: str,
    missing_ids: Sequence[int | str] = (),
) -> int:
    """Write ``index.shards`` and then ``index.json`` next to an ``index.members``.

    Args:
        records: of the shards, see `records_of`.
        members_sha256: of ``index.members``.

    Returns:
        Number of samples.
    """
    staging = folder / f"{SHARDS}.tmp"
    with staging.open("wb") as file:
        write_records(file, records)
    content: dict[str, Any] = {
        "version": VERSION,
        "dataset": dataset,
        "split": split,
        "num_shards": len(records),
        "num_samples": int(records["num_samples"].sum()),
        "num_items": dict(zip(COUNTED_KINDS, records["num_items"].sum(axis=0).tolist(), strict=True)),
        "missing_ids": list(missing_ids),
        "shards_bytes": staging.stat().st_size,
        "shards_sha256": sha256_of(staging),
        "members_sha256": members_sha256,
    }
    staging.replace(folder / SHARDS)
    staging = folder / f"{INDEX}.tmp"
    staging.write_text(json.dumps(content, indent=1) + "\n")
    staging.replace(folder / INDEX)
    return content["num_samples"]
