"""Reading training samples: this project's loader against webdataset's usual pipeline and a bare loop.

    ours        TrainingLoader: members by offset in the run's order, decoded, augmented, tokenized, masked, collated
    webdataset  shards shuffled, a shuffle buffer of 1000, the same decoding, augmentation, tokens and masks, collated
    bare        a loop over images in memory that decodes and augments and does nothing else: the limit

Then the same from an object store against a local folder, where a reader's time goes, what the reduced decode of large
photos saves, what resuming costs, and how memory grows with the size of the index.

Source: webdataset's documentation for the usual pipeline.
"""

import argparse
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.loader_contestants import (
    BARE,
    BATCH,
    IMAGE_SIZE,
    OURS,
    PREFETCH,
    SAMPLES_PER_SHARD,
    WEBDATASET,
    WINDOW,
    BareLoop,
    Setting,
    Stream,
    make_shards,
    ours,
    usual,
)
from benchmarks.loader_parts import measure_parts, measure_photos
from benchmarks.loader_store import CACHED, LOCAL, StoreRates, measure_store, missing_packages
from benchmarks.report import ROOT, machine, usable_cores, write_report
from unimo3.data.index import INDEX, MEMBERS, SHARDS, ShardIndex
from unimo3.data.index_writer import ShardTable, table_of, write_index
from unimo3.data.order import SampleOrder
from unimo3.errors import CommandParser, ConfigError, exit_with_status

log = logging.getLogger(__name__)

STORE_HEADING = "## From an object store"
_NEXT_HEADING = "\n\n## "
_INSTALL = "type: pip install 'moto[server]' s3fs"


def measure_rates(setting: Setting, workers: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Samples a second of each contestant in every round, in turns."""
    contestants: dict[str, Stream | BareLoop] = {
        OURS: Stream(ours(setting, workers), workers),
        WEBDATASET: Stream(usual(setting, workers), workers),
        BARE: BareLoop(setting, workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(rounds + 1), desc=f"{workers} readers", unit="round"):
        for name, contestant in contestants.items():
            rate = contestant.rate(seconds)
            if number:  # the first warms up
                rates[name].append(rate)
    del contestants
    gc.collect()
    return rates


def measure_resume(setting: Setting, workers: int) -> dict[str, tuple[float, float]]:
    """Seconds to the first batch at a fraction of an epoch: ours, and webdataset's to read up to there."""
    num_samples = ShardIndex(setting.folder / "train").num_samples
    seconds = {}
    for fraction in (0.0, 0.5, 0.99):
        position = int(fraction * num_samples)

        def first_batch(position: int = position) -> None:
            batches = ours(setting, workers, position // BATCH)
            next(batches)
            batches.close()  # type: ignore[attr-defined]

        def replay(position: int = position) -> None:
            for number, _ in enumerate(usual(setting, workers, decodes=False)):
                if number >= position:
                    break

        seconds[f"{fraction:.0%}"] = (_median_time(first_batch), _median_time(replay))
    return seconds


def _median_time(work: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def synthesize_index(folder: Path, real: Path, num_samples: int) -> None:
    """An index of `num_samples`, all of whose shards are links to a real one."""
    tar = next(iter(sorted(real.glob("*.tar"))))
    table = table_of(tar)
    number = -(-num_samples // table.num_samples)
    folder.mkdir(parents=True)

    def tables() -> Iterator[ShardTable]:
        for shard in range(number):
            name = f"{shard:06d}.tar"
            (folder / name).symlink_to(tar)
            yield ShardTable(name, table.num_bytes, table.sha256, table.num_samples, table.num_items, table.table)

    write_index(folder, "synthetic", "train", tables())


def probe(folder: Path) -> None:
    """Read 512 samples all over an index as a reader process does, and print its memory in bytes and its seconds."""
    start = time.perf_counter()
    index = ShardIndex(folder)
    order = SampleOrder(index.samples_per_shard, 0, WINDOW)
    ready = time.perf_counter() - start
    for position in np.linspace(0, order.num_units - 1, 512).astype(int).tolist():
        unit = order[position]
        index.read(unit.shard, unit.unit)
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    print(json.dumps([used, ready]))


def measure_memory(setting: Setting, sizes: list[int], scratch: Path) -> dict[int, tuple[float, float, int]]:
    """Memory and seconds to open of a reader, and bytes of the index on disk, by samples."""
    by_size = {}
    for size in tqdm(sizes, desc="index", unit="size"):
        folder = scratch / f"index_{size}"
        synthesize_index(folder, setting.folder / "train", size)
        command = [sys.executable, "-m", "benchmarks.loader", "--probe", str(folder)]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        used, ready = json.loads(output)
        by_size[size] = (used, ready, sum((folder / name).stat().st_size for name in (INDEX, SHARDS, MEMBERS)))
    return by_size


def report(
    rates: dict[int, dict[str, list[float]]],
    store: StoreRates | None,
    resume: dict[str, tuple[float, float]],
    memory: dict[int, tuple[float, float, int]],
    parts: dict[str, float],
    photos: list[tuple[str, int, float, float, float]],
    setting: Setting,
    num_samples: int,
) -> str:
    """The result in markdown."""
    lines = ["| readers | | samples/s | ours is | by round |", "| ---: | --- | ---: | ---: | --- |"]
    for workers, by_contestant in rates.items():
        for name, values in by_contestant.items():
            ratios = [one / other for one, other in zip(by_contestant[OURS], values, strict=True)]
            spread = "" if name == OURS else f"{min(ratios):.2f} to {max(ratios):.2f}"
            ratio = "" if name == OURS else f"{median(ratios):.2f} times as fast"
            lines.append(f"| {workers} | {name} | {median(values):.0f} | {ratio} | {spread} |")
    lines += [
        "",
        f"JPEGs of 640 x 480 pixels and 70 to 80 kB to {IMAGE_SIZE} pixels, augmentation `{setting.augment}`, batches",
        f"of {BATCH}, {PREFETCH} of them ahead, {num_samples} samples in shards of {SAMPLES_PER_SHARD}. Medians; all",
        "take their turn in every round. Each reader is one process, of the bare loop too; batches arrive in another.",
        "",
        *_store_lines(store),
        "## Where a reader's time goes",
        "",
        "| part, alone in one process | ms a batch | fraction of a complete batch |",
        "| --- | ---: | ---: |",
    ]
    complete = parts["complete batches"]
    lines += [f"| {name} | {value * 1e3:.1f} | {value / complete:.2f} |" for name, value in parts.items()]
    lines += [
        "",
        "The bare loop does the first part only, on fewer images, which stay in the processor's caches.",
        "",
        "## Large photos",
        "",
        "| photo | pixels of the square | `data.reduced_decode` | mean difference, grey levels | largest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {photo} | {size} | {ratio:.2f} times as fast | {mean:.2f} | {most:.0f} |"
        for photo, size, ratio, mean, most in photos
    ]
    lines += [
        "",
        "## Resuming",
        "",
        "| at | ours, s to the first batch | webdataset, s to read its way there, nothing decoded |",
        "| ---: | ---: | ---: |",
    ]
    lines += [f"| {fraction} of an epoch | {ours:.2f} | {usual:.2f} |" for fraction, (ours, usual) in resume.items()]
    lines += [
        "",
        "Ours opens the index, loads the tokenizer and starts two readers. webdataset's grows with the epoch; these",
        "few samples are in the page cache.",
        "",
        "## Size of the index",
        "",
        "| samples | reader's memory, MB | s to open | on disk, MB |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {size:,} | {used / 1e6:.0f} | {ready:.2f} | {disk / 1e6:.1f} |"
        for size, (used, ready, disk) in memory.items()
    ]
    return "\n".join(lines)


def _store_lines(store: StoreRates | None) -> list[str]:
    lines = [STORE_HEADING, ""]
    if store is None:
        return [*lines, f"Not measured: {', '.join(missing_packages())} was not installed.", ""]
    local, cached = store.by_round[LOCAL], store.by_round[CACHED]
    ratios = [one / other for one, other in zip(cached, local, strict=True)]
    first_local, first_stored = store.first_pass
    facts = machine()
    return [
        *lines,
        "| read from | samples/s | against the local folder | by round |",
        "| --- | ---: | ---: | --- |",
        f"| {LOCAL} | {median(local):.0f} |  |  |",
        f"| {CACHED} | {median(cached):.0f} | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
        f"| {LOCAL}, first pass | {first_local:.0f} |  |  |",
        f"| S3, first pass, cache empty | {first_stored:.0f} | {first_stored / first_local:.2f} |  |",
        "",
        f"{store.workers} readers. The server is moto, on loopback, in a process of its own on the same cores. A first",
        "pass is one epoch, and contains the start of its readers. Both others take their turn in every round.",
        f"Measured on {facts['date']} at commit {facts['commit']}.",
        "",
    ]


def replace_store(text: str, store: StoreRates) -> str:
    """A report with another table of the object store, which comes before the second heading where it has none."""
    section = "\n".join(_store_lines(store))
    before, heading, rest = text.partition(f"{STORE_HEADING}\n")
    if heading:
        return f"{before}{section}\n## {rest.partition(_NEXT_HEADING)[2]}"
    before, _, rest = text.partition(_NEXT_HEADING)
    return f"{before}\n\n{section}\n## {rest}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: something cannot be used.
    """
    parser = CommandParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each contestant (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a contestant's turn (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=16, help="of 256 samples each (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="readers (default: 1 2)")
    parser.add_argument("--photos", type=int, default=8, help="large photos of each size (default: %(default)s)")
    parser.add_argument(
        "--only-store", action="store_true", help="measure the object store alone, and replace its table in --out"
    )
    parser.add_argument("--augment", default="none", choices=("none", "randaugment"))
    parser.add_argument(
        "--index-samples",
        type=int,
        nargs="+",
        default=[10**4, 10**5, 10**6, 10**7],
        help="sizes of the synthetic index",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "loader.md")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    least = {name: getattr(args, name) for name in ("rounds", "seconds", "shards", "photos")}
    least |= {"workers": min(args.workers), "index-samples": min(args.index_samples)}
    errors = [f"--{name} {value}: a number above 0 is needed" for name, value in least.items() if value <= 0]
    if args.only_store and not args.out.is_file():
        errors.append(f"--out {args.out}: no such file; --only-store replaces one of its tables")
    if args.only_store and (missing := missing_packages()):
        errors.append(f"--only-store: {', '.join(missing)} is not installed; {_INSTALL}")
    if errors:
        raise ConfigError(errors)
    return args


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    args = parse(arguments)
    if args.probe:
        probe(args.probe)
        return
    torch.set_num_threads(1)
    if missing := missing_packages():
        log.warning(
            "%s is not installed, so reading from an object store is not measured; %s", ", ".join(missing), _INSTALL
        )
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(Path(scratch) / "shards", args.augment)
        setting.folder.mkdir()
        make_shards(setting.folder, args.shards)
        store = None
        if not missing:
            store = measure_store(setting, max(args.workers), args.rounds, args.seconds, Path(scratch))
        if args.only_store:
            assert store is not None
            args.out.write_text(replace_store(args.out.read_text(), store))
            print("\n".join(_store_lines(store)))
            return
        rates = {workers: measure_rates(setting, workers, args.rounds, args.seconds) for workers in args.workers}
        resume = measure_resume(setting, min(2, usable_cores()))
        memory = measure_memory(setting, args.index_samples, Path(scratch))
        parts, photos = measure_parts(setting, args.rounds), measure_photos(args.rounds, args.photos)
        text = report(rates, store, resume, memory, parts, photos, setting, args.shards * SAMPLES_PER_SHARD)
    write_report(args.out, "Reading training samples", text)
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
