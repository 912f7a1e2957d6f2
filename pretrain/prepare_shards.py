"""Public data sets -> WebDataset shards with an index, one folder a split."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from unimo3.data.answers import AnswerVocabulary
from unimo3.data.convert import CONVERTERS, Sample, answer_vocabulary, normalized_choices
from unimo3.data.shards import clear, write_splits
from unimo3.data.tokenizer import train_tokenizer
from unimo3.errors import CommandParser, ConfigError, DataError, exit_with_status


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.prepare_shards", description=__doc__)
    parser.add_argument("format", choices=sorted(CONVERTERS), help="the source's format")
    parser.add_argument("--src", type=Path, required=True, help="folder of the data set's annotation files")
    parser.add_argument("--images", type=Path, help="folder that holds train2014/ and val2014/ (default: --src)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the shards")
    parser.add_argument("--shard-size", type=int, default=1024, help="samples a shard (default: %(default)s)")
    parser.add_argument(
        "--tokenizer-vocab", type=int, default=0, metavar="N",
        help="coco: also train a byte-level BPE of N entries on the training captions, into OUT/tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--min-answer-count", type=int, default=9, metavar="N",
        help="vqav2: answers given at least N times form OUT/answers.json (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, all at once, before anything is read."""
    faults = []
    for name in ("src", "images"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            faults.append(f"--{name} {folder}: no such folder")
    if args.out.exists() and not args.overwrite:
        faults.append(f"--out {args.out}: exists; choose a new folder or give --overwrite")
    if args.out.exists() and args.overwrite and not is_output(args.out):
        faults.append(f"--out {args.out}: holds other things than shards; --overwrite removes only what this wrote")
    if args.shard_size < 1:
        faults.append(f"--shard-size {args.shard_size}: at least 1 is needed")
    if args.tokenizer_vocab and args.format != "coco":
        faults.append(f"--tokenizer-vocab {args.tokenizer_vocab}: only coco has captions to train on")
    if args.tokenizer_vocab and args.tokenizer_vocab < 300:
        faults.append(f"--tokenizer-vocab {args.tokenizer_vocab}: at least 300 (256 bytes and the special tokens)")
    if faults:
        raise ConfigError(faults)


def is_output(folder: Path) -> bool:
    """Whether a folder is what an earlier run wrote: splits with their index, tokenizer and answers, nothing else."""
    return folder.is_dir() and all(
        path.name in ("tokenizer", "answers.json") or (path / "index.json").is_file() for path in folder.iterdir()
    )


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Convert into a staging folder, then rename it."""
    args = parse_arguments(argv)
    check(args)
    staging = args.out.with_name(args.out.name + ".partial")
    if staging.exists():
        clear(staging)
    captions: list[str] = []
    choices: Counter[str] = Counter()

    def watched() -> Iterator[tuple[str, Sample]]:
        source = CONVERTERS[args.format](args.src, args.images or args.src)
        for split, sample in tqdm(source, desc=args.format, unit="image", disable=not sys.stderr.isatty()):
            if "questions" in sample.content:
                choices.update(normalized_choices(sample))
            elif split == "train" and args.tokenizer_vocab:
                captions.extend(sample.content["captions"])
            yield split, sample

    try:
        counts = write_splits(args.format, watched(), staging, args.shard_size)
        if args.tokenizer_vocab:
            size = train_tokenizer(captions, args.tokenizer_vocab, staging / "tokenizer")
            print(f"tokenizer: {size} entries from {len(captions)} captions")
        if choices:
            answers = answer_vocabulary(choices, args.min_answer_count)
            if not answers:
                raise DataError(
                    f"--min-answer-count {args.min_answer_count}: no answer is given that often (the most frequent, "
                    f"{choices.most_common(1)[0][0]!r}, {choices.most_common(1)[0][1]} times); lower it"
                )
            AnswerVocabulary(answers).save(staging / "answers.json")
            print(f"answers.json: {len(answers)} answers of {len(choices)}")
    except BaseException:
        if staging.exists():
            clear(staging)
        raise
    if args.out.exists():
        clear(args.out)
    staging.rename(args.out)
    for split, count in counts.items():
        print(f"{args.out / split}: {count} samples in {-(-count // args.shard_size)} shards")


if __name__ == "__main__":
    main()
