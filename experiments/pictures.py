"""A captioned data set of emoji and clip art, in the files of COCO Captions with Karpathy's splits.

    apt-get install fonts-noto-color-emoji ruby-gemojione libjs-emojify unicode-cldr-core openclipart-svg librsvg2-bin

The pictures and their captions come from these Debian packages; nothing is downloaded, and no data is in this project.
`pretrain.prepare_shards coco` makes shards of the folder, for pretraining and for retrieval. Near-duplicates are in one
split, see `near_duplicates`; a group of many pictures, such as all flags, is in training.

Source: Karpathy and Fei-Fei, arXiv 1412.2306, for the splits' file.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import usable_cores
from experiments import clip_art, emoji
from experiments.near_duplicates import Picture, group_numbers
from unimo3.errors import CommandParser, ConfigError, DataError, exit_with_status

HELD_OUT_FRACTION = 0.125
"""Of the pictures in ``val``, and in ``test``."""
MOST_HELD_OUT_GROUP = 12
"""Pictures of the largest group that may be held out."""
LEAST_PICTURES = 16
KINDS = ("noto", "emoji_one", "emojify", "clip_art")
"""Emoji of three artists, and clip art."""


def split_names(groups: Sequence[int], seed: int) -> list[str]:
    """``train``, ``val`` or ``test`` of each picture, the same for all pictures of a group.

    Args:
        groups: of the pictures, as `group_numbers` gives them.
        seed: the same seed gives the same splits.
    """
    size_of = Counter(groups)
    order = np.random.default_rng(seed).permutation(sorted(size_of))
    split_of = dict.fromkeys(size_of, "train")
    small = [int(group) for group in order if size_of[int(group)] <= MOST_HELD_OUT_GROUP]
    least = HELD_OUT_FRACTION * len(groups)
    for split in ("val", "test"):
        num_pictures = 0
        while small and num_pictures < least:
            group = small.pop()
            split_of[group] = split
            num_pictures += size_of[group]
    return [split_of[group] for group in groups]


def write_pictures(folder: Path, pictures: Sequence[Picture], splits: Sequence[str]) -> None:
    """``dataset_coco.json`` and one folder of PNGs a split, as `unimo3.data.formats.coco` reads them."""
    images = []
    for number, (picture, split) in enumerate(zip(pictures, splits, strict=True)):
        directory = folder / split
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{picture.name}_{number + 1}.png"
        picture.image.save(directory / name)
        sentences = [{"raw": caption, "tokens": caption.split(), "imgid": number} for caption in picture.captions]
        file = {"filepath": split, "filename": name, "split": split, "cocoid": number + 1}
        images.append(file | {"imgid": number, "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))


def kind_of(filename: str) -> str:
    """Of a picture in a ``dataset_coco.json``.

    Raises:
        DataError: it is of none.
    """
    for kind in KINDS:
        if filename.startswith(f"{kind}_"):
            return kind
    raise DataError(f"{filename}: its name begins with none of {', '.join(KINDS)}; make the folder of pictures again")


def make(folder: Path, pictures: Sequence[Picture], seed: int) -> Counter[str]:
    """Group and split the pictures, and write them into a new folder.

    Returns:
        Numbers of pictures, groups and captions.
    """
    groups = group_numbers(pictures)
    splits = split_names(groups, seed)
    staging = folder.with_name(f"{folder.name}.partial")
    if staging.exists():
        shutil.rmtree(staging)
    write_pictures(staging, pictures, splits)
    staging.rename(folder)
    counts = Counter({"pictures": len(pictures), "groups": len(set(groups))})
    counts.update(f"{split} pictures" for split in splits)
    counts["captions"] = sum(len(picture.captions) for picture in pictures)
    return counts


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``.

    Raises:
        ConfigError: with all its errors.
    """
    parser = CommandParser(prog="python -m experiments.pictures", description=__doc__)
    parser.add_argument("out", type=Path, help="new folder; gets dataset_coco.json and train/ val/ test/")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of pictures (default: all)")
    sources: dict[str, tuple[Path, str]] = {
        "--font": (emoji.FONT, "of the Noto emoji"),
        "--emoji-one": (emoji.EMOJI_ONE, "folder of gemojione"),
        "--emojify": (emoji.EMOJIFY, "folder of emojify's pictures; their short names are those of --emoji-one"),
        "--clip-art": (clip_art.FOLDER, "folder of SVG files"),
    }
    for option, (path, purpose) in sources.items():
        parser.add_argument(option, type=Path, default=path, help=f"{purpose} (default: %(default)s)")
    parser.add_argument(
        "--annotations", type=Path, nargs="+", default=list(emoji.ANNOTATIONS), help="LDML files of CLDR"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same splits (default: 0)")
    args = parser.parse_args(argv)
    errors = source_errors(args)
    if args.out.exists():
        errors.append(f"out {args.out}: exists; choose a new folder")
    if args.seed < 0:
        errors.append(f"--seed {args.seed}: 0 or more is needed")
    if errors:
        raise ConfigError(errors)
    return args


def source_errors(args: argparse.Namespace) -> list[str]:
    """Return what the kinds need and this machine does not have, one line each."""
    names = [(file, "unicode-cldr-core") for file in args.annotations]
    needed: dict[str, list[tuple[Path, str]]] = {
        "noto": [(args.font, "fonts-noto-color-emoji"), *names],
        "emoji_one": [(args.emoji_one, "ruby-gemojione"), *names],
        "emojify": [(args.emojify, "libjs-emojify"), (args.emoji_one, "ruby-gemojione"), *names],
        "clip_art": [(args.clip_art, "openclipart-svg")],
    }
    missing: dict[tuple[Path, str], list[str]] = {}
    for kind in args.kinds:
        for path, package in needed[kind]:
            if not path.exists():
                missing.setdefault((path, package), []).append(kind)
    errors = [
        f"{path}: does not exist; install Debian's package {package}, or choose other --kinds than {' '.join(kinds)}"
        for (path, package), kinds in missing.items()
    ]
    if "clip_art" in args.kinds and shutil.which("rsvg-convert") is None:
        errors.append("rsvg-convert: is not installed; install Debian's package librsvg2-bin, or leave out clip_art")
    return errors


def pictures_of(args: argparse.Namespace, skipped: Counter[str]) -> Iterator[Picture]:
    """Those of all kinds.

    Args:
        skipped: counts what is not a picture, by reason.
    """
    if {*args.kinds} != {"clip_art"}:
        cldr = emoji.read_annotations(tuple(args.annotations))
    if "noto" in args.kinds:
        yield from emoji.noto_pictures(args.font, cldr, skipped)
    if "emoji_one" in args.kinds:
        yield from emoji.emoji_one_pictures(args.emoji_one, cldr, skipped)
    if "emojify" in args.kinds:
        yield from emoji.emojify_pictures(args.emojify, args.emoji_one, cldr, skipped)
    if "clip_art" in args.kinds:
        yield from clip_art.clip_art_pictures(args.clip_art, usable_cores(), skipped)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Draw the pictures, split them, and print their numbers."""
    args = parse(argv)
    skipped: Counter[str] = Counter()
    pictures = list(pictures_of(args, skipped))
    if len(pictures) < LEAST_PICTURES:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise ConfigError(
            f"{len(pictures)} pictures: at least {LEAST_PICTURES} are needed for three splits; "
            f"skipped: {reasons or 'none'}"
        )
    for name, count in make(args.out, pictures, args.seed).items():
        print(f"{name}: {count}")
    for reason, count in sorted(skipped.items()):
        print(f"skipped: {count} {reason}")


if __name__ == "__main__":
    main()
