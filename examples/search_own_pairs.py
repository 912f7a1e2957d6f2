"""From a table of own images and captions to a search in these images: shards, fine-tuned retrieval, a search index.

python examples/search_own_pairs.py PAIRS.csv WEIGHTS OUT [--ranks N] [--config RECIPE] [--training.steps N ...]

PAIRS.csv has the columns image (a path, relative to the file) and caption; an image may have several rows. A tenth of
the images is held out. Further options go to finetune.retrieval. Each command is printed before it runs.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path


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
    parser.add_argument("pairs", type=Path, help="table that prepare_shards pairs reads")
    parser.add_argument("weights", type=Path, help="pretrained weights that pretrain.export wrote")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--ranks", default="1", help="processes, one for each GPU")
    parser.add_argument("--config", default="finetune/recipes/retrieval_flickr30k_base.yaml", help="recipe")
    args, settings = parser.parse_known_args()

    shards, runs, weights = args.out / "shards", args.out / "runs", args.out / "weights"
    run("pretrain.prepare_shards", "pairs", "--src", args.pairs, "--val-ratio", "0.1", "--out", shards)
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
