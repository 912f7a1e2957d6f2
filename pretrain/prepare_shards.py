"""Public data sets -> WebDataset shards with an index, one folder a split.

Under mpirun or srun the ranks share the work. A conversion that was killed continues when it is started again.
"""

import argparse
import logging
import re
import traceback
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from unimo3 import object_store
from unimo3.data.build_index import index, verify
from unimo3.data.conversion import MARK, MAX_REJECT_RATIO, Conversion, convert, is_output, sibling_folders
from unimo3.data.formats import CONVERTERS, pairs
from unimo3.data.formats.pairs import PairsOptions
from unimo3.data.formats.tables import TableOptions
from unimo3.data.mpi_jobs import communicator
from unimo3.data.stored_images import ImageOptions
from unimo3.data.upload import convert_and_upload
from unimo3.errors import CommandParser, ConfigError, Unimo3Error, exit_with_status
from unimo3.object_store import StoreError


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.prepare_shards", description=__doc__)
    parser.add_argument(
        "format",
        choices=[*sorted(CONVERTERS), "index"],
        help="the source's format; pairs: own images and captions; index: tars that are shards already get an index",
    )
    parser.add_argument(
        "--src",
        type=_folder,
        help="folder of the data set's annotation files; index: of the tars; pairs: a table, or a folder of images",
    )
    parser.add_argument(
        "--images",
        type=_folder,
        help="folder of the images, as docs/data.md describes (default: --src)",
    )
    parser.add_argument(
        "--out", type=_output, help="new folder for the shards, or a prefix in an object store: s3://BUCKET/PATH"
    )
    parser.add_argument(
        "--staging",
        type=_folder,
        metavar="DIR",
        help="of an --out in an object store: new local folder that the shards are made in, and removed from when they "
        "are sent (default: ./staging/BUCKET/PATH)",
    )
    parser.add_argument("--shard-size", type=int, default=1024, help="records a shard (default: %(default)s)")
    parser.add_argument(
        "--max-side",
        type=int,
        default=0,
        metavar="PIXELS",
        help="scale larger images to this by their longer side, as JPEG (default: store images as they are)",
    )
    parser.add_argument(
        "--quality", type=int, default=95, help="JPEG quality with --max-side, 1 to 95 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-reject-ratio",
        "--max-reject-share",  # its name until version 0.1, which queued jobs may have
        type=float,
        metavar="RATIO",
        help="largest fraction of a split's records without a usable image; above it, status 78 (default: "
        f"{MAX_REJECT_RATIO:g}, and 0 of test splits)",
    )
    parser.add_argument(
        "--tokenizer-vocab",
        type=int,
        default=0,
        metavar="N",
        help="coco, pairs: also train a byte-level BPE of N entries on the training captions, into OUT/tokenizer",
    )
    parser.add_argument(
        "--min-answer-count",
        type=int,
        default=9,
        metavar="N",
        help="vqav2: answers given at least N times form OUT/answers.json (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT, an index whose tars have changed, or another program's index.json",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="convert nothing: read every shard of OUT again and compare it with its index",
    )
    _add_pairs_options(parser.add_argument_group("pairs: a CSV, TSV, JSON lines or Parquet file, or a folder"))
    args = parser.parse_args(argv)
    args.url = args.out if args.out is not None and "://" in args.out else ""
    args.out = Path(args.out) if args.out is not None else None
    if args.url:
        args.out = args.staging or object_store.staging_folder(args.url)
    return args


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{object_store.without_secrets(text)}: is no folder; convert and index on a machine that has the files, "
            "and give --out, or copy the folder with its index, to the store"
        )
    return Path(text)


def _output(text: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/(?!/)", text):
        raise argparse.ArgumentTypeError(
            f"{text}: is no URL, which has two slashes: s3://BUCKET/PATH; for a folder, type ./ before a name with a "
            "colon"
        )
    return text


def _add_pairs_options(group: Any) -> None:
    """Options of `PairsOptions` and `TableOptions`; one that is not on the command line has the class's default."""

    def add(option: str, text: str, **details: Any) -> None:
        group.add_argument(option, default=argparse.SUPPRESS, help=text, **details)

    add("--image-column", "path below --images, absolute path, or URL of a file in --images (default: image)")
    add(
        "--caption-column",
        "one or several columns of captions (default: caption)",
        dest="caption_columns",
        nargs="+",
        metavar="COLUMN",
    )
    add("--id-column", "number or name of the image; rows with one id are about one image (default: by its path)")
    add("--split-column", "the row's split, such as train, val or test (default: --val-ratio decides)")
    add("--val-ratio", "fraction of the images that becomes val; the others are train (default: 0)", type=float)
    add("--seed", "seed of --val-ratio (default: 0)", type=int)
    add("--separator", "separator of a CSV's columns, \\t for a tab (default: a comma; in a .tsv file a tab)")
    add("--encoding", "encoding of CSV, TSV and .txt files, by Python's name (default: utf-8)")
    add("--no-quotes", "double quotes are characters like any other", dest="has_quotes", action="store_false")


_OPTIONS = {"caption_columns": "--caption-column", "has_quotes": "--no-quotes"}


def _option(name: str) -> str:
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def pairs_options(args: argparse.Namespace) -> PairsOptions:
    """The options of `pairs`."""
    options = _set_options(args)
    table = {field.name: options.pop(field.name) for field in fields(TableOptions) if field.name in options}
    return PairsOptions(**options, table=TableOptions(**table))


def _set_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `_add_pairs_options` that are on the command line."""
    names = {field.name for kind in (PairsOptions, TableOptions) for field in fields(kind)}
    options = {name: value for name, value in vars(args).items() if name in names}
    if "separator" in options:
        options["separator"] = options["separator"].replace("\\t", "\t")
    if "caption_columns" in options:
        options["caption_columns"] = tuple(options["caption_columns"])
    return options


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, all at once, before anything is read."""
    errors = []
    needed = {"src"} if args.format == "index" else {"out"} if args.verify else {"src", "out"}
    for name in ("src", "images"):
        folder = getattr(args, name)
        is_table = name == "src" and args.format == "pairs" and folder is not None and folder.is_file()
        if folder is not None and not folder.is_dir() and not is_table:
            errors.append(f"--{name} {folder}: no such folder{' or file' if args.format == 'pairs' else ''}")
    errors += [f"--{name}: not given; {_WHY[name]}" for name in sorted(needed) if getattr(args, name) is None]
    errors += _url_errors(args)
    if args.format == "index" and args.out is not None:
        errors.append(f"--out {args.url or args.out}: an index is written next to the tars of --src; leave it out")
    elif args.url:
        pass  # the local folder may be one that is still to be sent, which `check_upload` finds out
    elif args.verify and args.out is not None and not args.out.is_dir():
        errors.append(f"--out {args.out}: no such folder")
    elif not args.verify and args.out is not None and args.out.exists():
        if not args.overwrite:
            errors.append(f"--out {args.out}: exists; choose a new folder or give --overwrite")
        elif not is_output(args.out):
            errors.append(
                f"--out {args.out}: contains other things than shards; --overwrite removes only what this wrote"
            )
    if args.out is not None and not args.verify:
        option = "--staging" if args.url else "--out"
        errors += [
            f"{option} {args.out}: {path} is in the way: it is not a folder this program began; move it or choose "
            "another"
            for path in sibling_folders(args.out)
            if path.exists() and not (path / MARK).exists() and not (path.is_dir() and not any(path.iterdir()))
        ]
    if args.shard_size < 1:
        errors.append(f"--shard-size {args.shard_size}: at least 1 is needed")
    if args.max_side < 0:
        errors.append(f"--max-side {args.max_side}: a number of pixels, or 0 to store images as they are")
    if not 1 <= args.quality <= 95:
        errors.append(f"--quality {args.quality}: 1 to 95 is needed")
    if args.max_reject_ratio is not None and not 0 <= args.max_reject_ratio < 1:
        errors.append(f"--max-reject-ratio {args.max_reject_ratio}: at least 0 and below 1 is needed")
    if args.min_answer_count < 1:
        errors.append(f"--min-answer-count {args.min_answer_count}: at least 1 is needed")
    if args.tokenizer_vocab and args.format not in ("coco", "pairs"):
        errors.append(f"--tokenizer-vocab {args.tokenizer_vocab}: only coco and pairs train a tokenizer")
    if args.tokenizer_vocab and args.tokenizer_vocab < 300:
        errors.append(f"--tokenizer-vocab {args.tokenizer_vocab}: at least 300 (256 bytes and the special tokens)")
    errors += _pairs_errors(args)
    if errors:
        raise ConfigError(errors)


def _pairs_errors(args: argparse.Namespace) -> list[str]:
    """Errors of the options of `pairs`, one line each."""
    options = _set_options(args)
    if args.format != "pairs":
        return [f"{_option(name)}: is an option of pairs only" for name in options]
    errors = []
    if not 0 <= options.get("val_ratio", 0) < 1:
        errors.append(f"--val-ratio {options['val_ratio']}: at least 0 and below 1 is needed")
    if options.get("val_ratio") and "split_column" in options:
        errors.append(f"--val-ratio {options['val_ratio']}: --split-column decides already; leave one out")
    if len(options.get("separator", ",")) != 1:
        errors.append(f"--separator {options['separator']!r}: one character is needed")
    if args.src is not None and args.src.is_dir():
        of_tables = {*options} - {"val_ratio", "seed", "encoding"}
        errors += [
            f"{_option(name)}: is for a table, and --src {args.src} is a folder; leave it out"
            for name in sorted(of_tables | ({"images"} if args.images is not None else set()))
        ]
    return errors


_WHY = {"src": "name the folder of the annotation files, or of the tars", "out": "name the folder of the shards"}


def _url_errors(args: argparse.Namespace) -> list[str]:
    """Errors of an output in an object store, which is not looked up."""
    if not args.url:
        return [] if args.staging is None else [f"--staging {args.staging}: only an --out in an object store has one"]
    if args.verify:
        return [
            f"--verify: reads a folder; copy {object_store.without_secrets(args.url)} to one. A run compares each "
            "shard that it copies with its index"
        ]
    if not object_store.is_store(args.url):
        return [f"--out {object_store.without_secrets(args.url)}: is not written by this program; name a folder or s3:"]
    try:
        object_store.check_url(args.url)
    except StoreError as error:
        return [f"--out {error}"]
    return []


def conversion_of(args: argparse.Namespace) -> Conversion:
    """What the command line asks to convert."""
    converter = CONVERTERS[args.format]
    if args.format == "pairs":
        converter = partial(pairs.convert, options=pairs_options(args))
    return Conversion(
        args.format,
        converter,
        args.src,
        args.images or (args.src if args.src.is_dir() else args.src.parent),
        args.out,
        args.overwrite,
        args.shard_size,
        ImageOptions(args.max_side, args.quality),
        args.max_reject_ratio,
        args.tokenizer_vocab,
        args.min_answer_count,
        args.url,
    )


def run(args: argparse.Namespace, comm: Any) -> None:
    """Run the command; every rank calls it."""
    if args.verify:
        verify(args.src if args.format == "index" else args.out, comm)
    elif args.format == "index":
        index(args.src, args.overwrite, comm)
    elif args.url:
        convert_and_upload(conversion_of(args), comm)
    else:
        convert(conversion_of(args), comm)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Convert, index or verify."""
    args = parse_arguments(argv)
    comm = communicator()
    leads = comm is None or comm.rank == 0
    errors: list[str] = []
    try:
        check(args)
    except ConfigError as error:
        errors = error.errors
    # A node may lack what another has: an error on one rank ends all.
    if comm is not None:
        errors = list(dict.fromkeys(problem for rank_errors in comm.allgather(errors) for problem in rank_errors))
    if errors:
        if leads:
            raise ConfigError(errors)
        return
    logging.basicConfig(level=logging.INFO if leads else logging.WARNING, format="%(asctime)s %(message)s")
    try:
        run(args, comm)
    except Unimo3Error:
        raise
    except BaseException:
        if comm is not None:
            # The other ranks would wait for this one without end.
            traceback.print_exc()
            comm.Abort(1)
        raise


if __name__ == "__main__":
    main()
