"""From a CSV of own images and captions to a search in these images: shards, fine-tuned retrieval, a search index.

python examples/search_own_pairs.py PAIRS.csv WEIGHTS OUT [--ranks N] [--config RECIPE] [--training.steps N ...]

PAIRS.csv has the columns image (a path, relative to the file) and caption; an image may have several rows. A tenth of
the images is held out. Further options go to finetune.retrieval. Each command is printed before it runs.
"""

import argparse
import csv
import hashlib
import json
import math
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import webdataset

SHARD_SIZE = 1000
VAL_RATIO = 0.1


def captions_by_image(table: Path) -> dict[Path, list[str]]:
    """The captions of each image of the CSV."""
    captions: dict[Path, list[str]] = defaultdict(list)
    with table.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            captions[table.parent / row["image"]].append(row["caption"])
    return captions


def write_shards(captions: dict[Path, list[str]], shards: Path) -> None:
    """Write train/ and val/; all captions of an image are in the same split."""
    by_hash = sorted(captions, key=lambda image: hashlib.sha256(image.name.encode()).digest())
    held_out = set(by_hash[: math.ceil(VAL_RATIO * len(by_hash))])
    for split in ("train", "val"):
        (shards / split).mkdir(parents=True)
        with webdataset.ShardWriter(f"{shards}/{split}/%06d.tar", maxcount=SHARD_SIZE, verbose=0) as writer:
            for number, (image, texts) in enumerate(captions.items()):
                if (image in held_out) == (split == "val"):
                    entry = {"captions": texts, "image_id": number}
                    ending = image.suffix.lower().removeprefix(".")
                    writer.write(
                        {"__key__": f"{number:09d}", ending: image.read_bytes(), "json": json.dumps(entry).encode()}
                    )


def run(module: str, *arguments: str | Path) -> None:
    """Run ``python -m module``; end if it fails, with its status."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print("\n$", shlex.join(command), flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Make the shards, tune, export, and make the search index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="CSV file")
    parser.add_argument("weights", type=Path, help="pretrained weights that pretrain.export wrote")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--ranks", default="1", help="processes, one for each GPU")
    parser.add_argument("--config", default="finetune/recipes/retrieval_flickr30k_base.yaml", help="recipe")
    args, settings = parser.parse_known_args()

    try:
        captions = captions_by_image(args.pairs)
    except KeyError as error:
        parser.error(f"{args.pairs}: has no column {error}; the columns image and caption are needed")
    if len(captions) < 2:
        parser.error(f"{args.pairs}: lists {len(captions)} images; at least 2 are needed, one of them to hold out")
    shards, runs, weights = args.out / "shards", args.out / "runs", args.out / "weights"
    write_shards(captions, shards)
    for split in ("train", "val"):
        run("pretrain.prepare_shards", "index", "--src", shards / split)
    run(
        *("unimo3.launch", "-n", args.ranks, "finetune.retrieval", "--config", args.config),
        *("--init", args.weights, "--data.tokenizer", args.weights),
        *("--data.train", shards / "train", "--data.val", shards / "val"),
        *("--run.dir", runs, "--run.name", "retrieval", *settings),
    )
    run("pretrain.export", runs / "retrieval", "--tag", "best", "--out", weights)
    run("finetune.predict", "index", "--weights", weights, "--images", args.pairs.parent, "--out", args.out / "index")
    search = ("finetune.predict", "retrieval", "--weights", weights, "--index", args.out / "index")
    print(f"\nSearch: {sys.executable} -m", *search, '--text "..."')


if __name__ == "__main__":
    main()
