"""Converting images to shards: images a second of prepare_shards with one rank and with two.

Source: none; the command logs how many records a second it wrote, start-up and index excluded.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tqdm import tqdm

from benchmarks.loader_contestants import NUM_PICTURES, picture
from benchmarks.report import ROOT, write_report
from unimo3.errors import CommandParser, ConfigError, exit_with_status

WAYS = {"stored as they are": (), "scaled to 384 pixels": ("--max-side", "384")}
_RATE = re.compile(r"(\d+) records \(0 were there already\), (\d+) a second, 0 rejected")


def make_source(folder: Path, num_images: int) -> None:
    """COCO's captions file with JPEGs of 640 x 480 pixels; beyond the first few they are copies."""
    (folder / "train2014").mkdir(parents=True)
    pictures = [picture(number) for number in range(min(NUM_PICTURES, num_images))]
    images = []
    for number in range(num_images):
        name = f"{number}.jpg"
        (folder / "train2014" / name).write_bytes(pictures[number % len(pictures)])
        sentences = [{"raw": f"caption {index} of picture {number}"} for index in range(5)]
        images.append(
            {"filepath": "train2014", "filename": name, "split": "train", "cocoid": number, "sentences": sentences}
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def rate_of(source: Path, out: Path, ranks: int, arguments: tuple[str, ...]) -> float:
    """Images a second of one conversion."""
    program = [sys.executable, "-m", "pretrain.prepare_shards", "coco", "--src", str(source), "--out", str(out)]
    launcher = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    command = (launcher if ranks > 1 else []) + program + ["--shard-size", "64", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    rates = _RATE.findall(done.stderr)
    return float(rates[-1][1])


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    parser = CommandParser(prog="python -m benchmarks.shards", description=__doc__)
    parser.add_argument("--images", type=int, default=3000, help="to convert each time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="conversions of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "shards.md")
    args: argparse.Namespace = parser.parse_args(arguments)
    if args.images < 64 or args.rounds < 1:
        raise ConfigError(f"--images {args.images} --rounds {args.rounds}: at least 64 and 1 are needed")
    rates: dict[tuple[str, int], list[float]] = {(way, ranks): [] for way in WAYS for ranks in (1, 2)}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        make_source(source, args.images)
        for _ in tqdm(range(args.rounds), unit="round"):
            for way, ranks in rates:
                rates[way, ranks].append(rate_of(source, Path(scratch) / "out", ranks, WAYS[way]))
    lines = ["| images | 1 rank, images/s | 2 ranks | times, by round |", "| --- | ---: | ---: | --- |"]
    for way in WAYS:
        alone, both = rates[way, 1], rates[way, 2]
        times = ", ".join(f"{two / one:.2f}" for one, two in zip(alone, both, strict=True))
        lines.append(f"| {way} | {median(alone):.0f} | {median(both):.0f} | {times} |")
    text = "\n".join(lines) + (
        f"\n\nMedians of {args.rounds} conversions of {args.images} JPEGs of 640 x 480 pixels and 70 to 80 kB, each "
        "decoded once;\nstart-up and the index excluded."
    )
    write_report(args.out, "Converting images to shards", text)
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
