"""Draws miniature data sets (COCO, VQAv2, NLVR2, SNLI-VE, Flickr30K, SugarCrepe, Winoground) in the public formats."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unimo3.data.blind_baseline import BlindGuesser
from unimo3.data.toy.choices import write_sugarcrepe, write_winoground
from unimo3.data.toy.formats import write_coco_and_vqav2, write_flickr30k_and_snli_ve, write_nlvr2
from unimo3.errors import CommandParser, ConfigError, exit_with_status


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.toy", description=__doc__)
    parser.add_argument("out", type=Path, help="new folder; gets a folder a data set, such as coco/")
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="COCO images; others have a quarter of them, SugarCrepe and Winoground a sixteenth (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Draw into a staging folder, rename it, and print how far questions alone give their answers away."""
    args = parse_arguments(argv)
    errors = []
    if args.images < 40:
        errors.append(f"--images {args.images}: at least 40 are needed to fill every split")
    if args.size < 32:
        errors.append(f"--size {args.size}: at least 32 pixels are needed to distinguish textures")
    if args.seed < 0:
        errors.append(f"--seed {args.seed}: 0 or more is needed")
    if args.out.exists():
        errors.append(f"out {args.out}: exists; choose a new folder")
    if errors:
        raise ConfigError(errors)

    def progress(numbers: Iterable[int], name: str) -> Iterable[int]:
        return tqdm(numbers, desc=name, unit="image", disable=not sys.stderr.isatty())

    staging = args.out.with_name(args.out.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    few = args.images // 4
    counts = write_coco_and_vqav2(staging, args.images, args.size, args.seed, progress)
    counts |= write_flickr30k_and_snli_ve(staging, few, args.size, args.seed, progress)
    counts |= write_nlvr2(staging, few, args.size, args.seed, progress)
    fewer = args.images // 16
    counts |= write_sugarcrepe(staging, fewer, args.size, args.seed, progress)
    counts |= write_winoground(staging, fewer, args.size, args.seed, progress)
    staging.rename(args.out)
    for name, count in counts.items():
        print(f"{name}: {count}")
    rates = blind_rates(args.out / "vqav2")
    print("VQA accuracy of the best guess from the question alone, which a model must pass:")
    for group, rate in rates.items():
        print(f"  {group}: {rate:.3f}")


def blind_rates(folder: Path) -> dict[str, float]:
    """Accuracy on the validation questions of the best guess from the text alone, overall and per granularity."""
    return BlindGuesser(_questions(folder, "train2014")).accuracy(_questions(folder, "val2014"))


def _questions(folder: Path, year: str) -> list[dict[str, Any]]:
    texts = json.loads((folder / f"v2_OpenEnded_mscoco_{year}_questions.json").read_text())["questions"]
    notes = json.loads((folder / f"v2_mscoco_{year}_annotations.json").read_text())["annotations"]
    of_id = {text["question_id"]: text["question"] for text in texts}
    return [
        note | {"question": of_id[note["question_id"]], "answers": [answer["answer"] for answer in note["answers"]]}
        for note in notes
    ]


if __name__ == "__main__":
    main()
