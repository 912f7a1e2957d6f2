"""Writes the index of a folder of tars; `unimo3.data.index` has its files.

Source: none.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimo3.data.index import INDEX, MEMBERS, VERSION
from unimo3.data.members import COUNTED_KINDS, scan, sha256_of
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
    """Write ``index.members`` and then ``index.json``: a folder with an index.json is complete.

    Args:
        tables: one a shard, taken one by one.
        missing_ids: of the entries that the split has and the shards do not.

    Returns:
        Number of samples.

    Raises:
        DataError: there is no sample in any of the shards.
    """
    shards: list[dict[str, Any]] = []
    staging = folder / f"{MEMBERS}.tmp"
    digest = hashlib.sha256()
    with staging.open("wb") as file:
        for table in tables:
            shards.append(
                {
                    "name": table.name,
                    "bytes": table.num_bytes,
                    "sha256": table.sha256,
                    "num_samples": table.num_samples,
                    "num_items": table.num_items,
                    "table": [file.tell(), len(table.table), hashlib.sha256(table.table).hexdigest()],
                }
            )
            file.write(table.table)
            digest.update(table.table)
    num_samples = sum(shard["num_samples"] for shard in shards)
    if not num_samples:
        staging.unlink()
        raise DataError(f"{folder}: its {len(shards)} tars contain no samples; an index needs at least one")
    content = {
        "version": VERSION,
        "dataset": dataset,
        "split": split,
        "num_samples": num_samples,
        "num_items": {kind: sum(shard["num_items"][kind] for shard in shards) for kind in COUNTED_KINDS},
        "missing_ids": list(missing_ids),
        "members_sha256": digest.hexdigest(),
        "shards": shards,
    }
    # In this order: an old index.json with new members is detected by its checksums.
    staging.replace(folder / MEMBERS)
    staging = folder / f"{INDEX}.tmp"
    staging.write_text(json.dumps(content, indent=1) + "\n")
    staging.replace(folder / INDEX)
    return num_samples
