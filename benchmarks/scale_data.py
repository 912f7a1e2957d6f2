"""An index of 2 x 10^9 samples in 2 x 10^6 shards: seconds and memory of a reader that opens it and seeks in it.

    python -m benchmarks.scale_data FOLDER POSITIONS RESULT    (the reader, a fresh process)

Index and order are those of a run. One tar stands for all shards: those that are read or looked at are links to it, and
``index.members`` is a sparse file with the tables of those that are read. The tables of all would take 150 GB.

Source: none.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from unimo3.data.index import INDEX, MEMBERS, SHARDS, ShardIndex, checked_shards
from unimo3.data.index_writer import ShardTable, table_of, write_shards
from unimo3.data.order import SampleOrder
from unimo3.data.shard_records import Shard, records_of

NUM_SHARDS, SAMPLES_PER_SHARD = 2_000_000, 1000
# What fits in the layout of version 3, which has all facts of the shards in index.json.
NUM_OLD_SHARDS = 200_000
NUM_SEEKS = 1000
GLOBAL_BATCH, WINDOW_SHARDS, SEED = 4096, 16, 0
_SHA256_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@dataclass(frozen=True)
class Reading:
    """What a reader takes, in seconds and bytes.

    Attributes:
        index_bytes: of ``index.json`` and ``index.shards``.
        open_s: to open the index, with the checksums that a run compares.
        open_cpu_s: the processor's part of it.
        plan_s: to make the order and permute the shards of the epoch in which the run is resumed.
        resume_s: from the first position of the resumed step to the bytes of its sample.
        seek_median_s, seek_max_s: the same of random positions, and of that one.
        peak_bytes: resident, pages that processes share included.
        private_bytes: after the last seek, of no file, so of the process alone.
    """

    layout: str
    num_shards: int
    num_samples: int
    index_bytes: int
    open_s: float
    open_cpu_s: float
    plan_s: float
    resume_s: float
    seek_median_s: float
    seek_max_s: float
    peak_bytes: int
    private_bytes: int


def measure_data(
    work: Path, num_shards: int = NUM_SHARDS, num_old_shards: int = NUM_OLD_SHARDS, num_seeks: int = NUM_SEEKS
) -> list[Reading]:
    """A reader of each layout at the size that both can have, and of the present one at full size.

    Args:
        work: an empty folder.
    """
    tar = _write_tar(work / "shard.tar")
    table = table_of(tar)
    results = []
    for version, number in ((3, num_old_shards), (4, num_old_shards), (4, num_shards)):
        folder = work / f"version_{version}_{number}"
        positions = _write_folder(folder, tar, table, number, num_seeks)
        if version == 3:
            write_version_3(folder)
        files = [path for path in (folder / INDEX, folder / SHARDS, folder / MEMBERS) if path.exists()]
        _drop_from_memory(files)
        (work / "positions.json").write_text(json.dumps(positions))
        arguments = [str(folder), str(work / "positions.json"), str(work / "result.json")]
        subprocess.run([sys.executable, "-m", "benchmarks.scale_data", *arguments], check=True)
        index_bytes = sum(path.stat().st_size for path in files if path.name != MEMBERS)
        measured = json.loads((work / "result.json").read_text())
        results.append(Reading(f"version {version}", number, number * table.num_samples, index_bytes, **measured))
        for path in files:
            path.unlink()
    return results


def data_table(results: list[Reading]) -> str:
    """The results in markdown."""
    rows: dict[str, Callable[[Reading], str]] = {
        "shards": lambda one: f"{one.num_shards:,}",
        "samples": lambda one: f"{one.num_samples:,}",
        "`index.json` and `index.shards`, MB": lambda one: f"{one.index_bytes / 1e6:.1f}",
        "open, s": lambda one: f"{one.open_s:.2f}",
        "of it the processor's time, s": lambda one: f"{one.open_cpu_s:.2f}",
        "plan an epoch, s": lambda one: f"{one.plan_s:.2f}",
        "seek of a resume, ms": lambda one: f"{one.resume_s * 1e3:.1f}",
        "random seek, median, ms": lambda one: f"{one.seek_median_s * 1e3:.1f}",
        "slowest seek of all, ms": lambda one: f"{one.seek_max_s * 1e3:.1f}",
        "peak memory, MB": lambda one: f"{one.peak_bytes / 1e6:.0f}",
        "private memory, MB": lambda one: f"{one.private_bytes / 1e6:.0f}",
    }
    lines = [f"| | {' | '.join(one.layout for one in results)} |", f"| --- |{' ---: |' * len(results)}"]
    lines += [f"| {name} | {' | '.join(map(of, results))} |" for name, of in rows.items()]
    old, new = results[:2]
    lines += [
        "",
        f"At {old.num_shards:,} shards the present layout opens in {new.open_s / old.open_s:.2f} of the time of",
        f"version 3, and its peak is {new.peak_bytes / old.peak_bytes:.2f} of that of version 3.",
        "",
        "Each column is a fresh process, without torch; nothing of the index is in the page cache when it starts.",
        "Version 3 has all in `index.json`. Opening includes all checksums that a run compares. Planning permutes the",
        "shards of the epoch in which the run is resumed, once an epoch. A seek is from a position of the order to the",
        "bytes of its sample, of a shard whose table and tar were not read before. Peak memory includes the pages of",
        "`index.shards`, which all processes of a node share; private memory does not. Python and NumPy themselves",
        "take about 50 MB.",
    ]
    return "\n".join(lines)


def _write_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(SAMPLES_PER_SHARD):
            for extension, content in (("jpg", b"x"), ("json", json.dumps({"caption": str(number)}).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return path


def _write_folder(folder: Path, tar: Path, table: ShardTable, num_shards: int, num_seeks: int) -> list[int]:
    """Write an index and what is read of its shards; the positions to read, first that of a random step."""
    folder.mkdir()
    records = records_of(_shards(table, num_shards))
    write_shards(folder, "synthetic", "train", records, _SHA256_OF_NOTHING)
    order = SampleOrder(records["num_samples"], SEED, WINDOW_SHARDS)
    rng = np.random.default_rng(SEED)
    step = int(rng.integers(order.num_units // GLOBAL_BATCH, 2 * order.num_units // GLOBAL_BATCH)) + 1
    epoch = step * GLOBAL_BATCH // order.num_units
    random = (rng.integers(0, order.num_units, num_seeks) + epoch * order.num_units).tolist()
    positions = [step * GLOBAL_BATCH, *random]
    read = {order[position].shard for position in positions}
    with (folder / MEMBERS).open("wb") as file:
        file.truncate(num_shards * len(table.table))
        for shard in read:
            file.seek(shard * len(table.table))
            file.write(table.table)
    for shard in read.union(checked_shards(num_shards)):
        (folder / _name(shard)).symlink_to(tar)
    return positions


def _shards(table: ShardTable, num_shards: int) -> Iterator[Shard]:
    digest, size = hashlib.sha256(table.table).hexdigest(), len(table.table)
    facts = (table.num_bytes, table.sha256, table.num_samples, table.num_items)
    return (Shard(_name(number), *facts, number * size, size, digest) for number in range(num_shards))


def _name(shard: int) -> str:
    return f"{shard:07d}.tar"


def write_version_3(folder: Path) -> Path:
    """Replace an index by one of version 3, which has the shards in ``index.json``; the path of that file."""
    path = folder / INDEX
    shards = [
        {
            "name": shard.name,
            "bytes": shard.num_bytes,
            "sha256": shard.sha256,
            "num_samples": shard.num_samples,
            "num_items": shard.num_items,
            "table": [shard.table_offset, shard.table_bytes, shard.table_sha256],
        }
        for shard in ShardIndex(folder, check_files=False).shards
    ]
    new = ("num_shards", "shards_bytes", "shards_sha256")
    content = {name: value for name, value in json.loads(path.read_text()).items() if name not in new}
    path.write_text(json.dumps(content | {"version": 3, "shards": shards}, indent=1))
    (folder / SHARDS).unlink()
    return path


def _drop_from_memory(paths: Iterable[Path]) -> None:
    """Let the first read of files come from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_role(folder: Path, positions: list[int]) -> dict[str, Any]:
    """Be the reader.

    Raises:
        RuntimeError: the bytes of a position are not those of its sample.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    index = ShardIndex(folder)
    fingerprint = index.fingerprint
    opened, opened_cpu = time.perf_counter(), time.process_time()
    order = SampleOrder(index.samples_per_shard, SEED, WINDOW_SHARDS)
    order[positions[0]]
    planned = time.perf_counter()
    seconds = []
    for position in positions:
        begin = time.perf_counter()
        unit = order[position]
        members = index.read(unit.shard, unit.unit)
        seconds.append(time.perf_counter() - begin)
        if json.loads(members["json"]) != {"caption": str(unit.unit)} or not fingerprint:
            raise RuntimeError(f"position {position}: not the bytes of sample {unit.unit} of shard {unit.shard}")
    return {
        "open_s": opened - start,
        "open_cpu_s": opened_cpu - start_cpu,
        "plan_s": planned - opened,
        "resume_s": seconds[0],
        "seek_median_s": median(seconds),
        "seek_max_s": max(seconds),
        "peak_bytes": _memory_bytes("VmHWM"),
        "private_bytes": _memory_bytes("RssAnon"),
    }


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    result = read_role(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(result))
