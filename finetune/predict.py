"""Answers of tuned weights: for a question, a statement, a hypothesis or a search, or for a file of many.

    predict vqa --weights W --image F --text "what is it?"
    predict nlvr2 --weights W --image LEFT --image RIGHT --text "both are dogs"
    predict snli_ve --weights W --image F --text "a dog sleeps"
    predict retrieval --weights W --image F --text "a dog"          whether they match; several of one are ranked
    predict index --weights W --images FOLDER --out INDEX           once; or --texts FILE, one text a line
    predict retrieval --weights W --index INDEX --text "a dog"      searches images; a text index by --image
    predict TASK --weights W --input IN.jsonl --output OUT.jsonl    many at a time

One process, no launcher. A line of IN.jsonl is an object {"image": PATH, "text": ...}, of NLVR2 with a list of two
paths; with --index the text alone, or the image. Paths start from the file's folder; further fields are kept. A line
of OUT.jsonl has "line", its number, "input", and "answers" or, if that line is at fault, "error": the others are
answered all the same, all faults are told at the end, and the exit status is 78. OUT.jsonl appears whole.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import unimo3  # noqa: F401  (before transformers: it makes torchvision importable)
from unimo3.errors import CommandParser, ConfigError, DataError, exit_with_status
from unimo3.inference.folder import DTYPES, Loaded, load
from unimo3.inference.gallery import embed_images, embed_texts, images_in, open_gallery, save
from unimo3.inference.inputs import Row, checked_text, prepare
from unimo3.inference.lines import Answerer, answer_file, count_lines, fault_message, images_of, text_of
from unimo3.inference.predictors import PREDICTORS, Answers, Predictor
from unimo3.inference.search import Search

_NUM_FAULTS_SHOWN = 10


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(
        prog="python -m finetune.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", required=True, help="folder that python -m pretrain.export wrote")
    common.add_argument("--batch", type=int, default=32, help="images, texts or pairs at a time (default: %(default)s)")
    common.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    common.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="to compute in (default: the weights' own; of fp16 weights on a CPU fp32, and a notice says so)",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK", help=f"{', '.join(PREDICTORS)}, index")
    for task, kind in PREDICTORS.items():
        _add_task(commands.add_parser(task, parents=[common], help=(kind.__doc__ or "").splitlines()[0]), task)
    index = commands.add_parser("index", parents=[common], help="Make an index that retrieval searches.")
    what = index.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, help="folder of images, with those below it")
    what.add_argument("--texts", type=Path, help="file with one text a line")
    index.add_argument("--out", type=Path, required=True, help="new folder of the index")
    return parser.parse_args(argv)


def _add_task(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file; repeat it for several")
    parser.add_argument("--text", action="append", default=[], help="question, statement, hypothesis or caption")
    parser.add_argument("--input", type=Path, help="JSON lines instead of --image and --text")
    parser.add_argument("--output", type=Path, help="JSON lines with the answers to --input")
    parser.add_argument("--top", type=int, default=5, help="answers to give (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    if task == "retrieval":
        parser.add_argument("--index", type=Path, help="folder that predict index wrote, to search in")
        parser.add_argument(
            "--rerank", type=int, default=32,
            help="candidates of the towers that the fusion encoder puts in order; 0: none (default: %(default)s)",
        )  # fmt: skip


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Predict, or make an index."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    faults = [
        f"--{name} {value}: at least 1 is needed"
        for name in ("batch", "top")
        if (value := getattr(args, name, 1)) < 1
    ] + (_index_faults(args) if args.task == "index" else _query_faults(args))  # fmt: skip
    if faults:
        raise ConfigError(faults)
    if args.task == "index":
        make_index(args)
        return
    kind = PREDICTORS[args.task]
    loaded = load(args.weights, kind.model_class, args.device, args.dtype)
    predictor = kind(loaded)
    find = _searcher(args, loaded)
    if args.input is not None:
        answer_lines(args, predictor, find)
        return
    texts = [checked_text(text, "--text") for text in args.text]
    if find is not None:
        answers = find(texts[0] if texts else args.image[0], args.top)
    elif args.task == "retrieval" and (len(args.image) > 1 or len(texts) > 1):
        answers = rank(loaded, args.image, texts, args.batch, args.top)
    else:
        (answers,) = predictor.predict([prepare(loaded, Row(tuple(args.image), texts[0]))], args.top)
    show(answers, args)


def _index_faults(args: argparse.Namespace) -> list[str]:
    return [f"--out {args.out}: exists; choose a new folder"] if args.out.exists() else []


def _query_faults(args: argparse.Namespace) -> list[str]:
    """Say which of what is asked does not go together, one line a fault."""
    if args.input is not None:
        found = [f"--input {args.input}: holds what is asked; leave out --image and --text"] * bool(
            args.image + args.text
        )
        if args.output is None:
            found.append(f"--input {args.input}: needs --output, a file for the answers")
        elif args.output.resolve() == args.input.resolve():
            found.append(f"--output {args.output}: is --input; name another file")
        return found
    found = [f"--output {args.output}: is for --input; leave it out, or redirect --json"] * (args.output is not None)
    num_images, num_texts = len(args.image), len(args.text)
    if args.task != "retrieval":
        needed = PREDICTORS[args.task].num_images
        if num_images != needed:
            found.append(f"--image: given {num_images} times; {args.task} takes {needed}")
        if num_texts != 1:
            found.append(f"--text: given {num_texts} times; {args.task} takes one")
    elif args.index is not None:
        if num_images + num_texts != 1:
            found.append(
                f"--index {args.index}: needs one --text, or one --image; {num_texts} and {num_images} are given"
            )
    elif not num_images or not num_texts or min(num_images, num_texts) > 1:
        found.append(
            f"--image and --text: given {num_images} and {num_texts} times; retrieval takes one of each, several of "
            "one to rank for the other, or --index"
        )
    return found


def _searcher(args: argparse.Namespace, loaded: Loaded) -> Callable[[str | Path, int], Answers] | None:
    """The search in ``--index``, if there is one."""
    if getattr(args, "index", None) is None:
        return None
    gallery = open_gallery(args.index, Path(args.weights))
    if gallery.kind == "images" and args.image:
        raise ConfigError(f"--image {args.image[0]}: {args.index} holds images, which a text searches; give --text")
    if gallery.kind == "texts" and args.text:
        raise ConfigError(f"--text '{args.text[0]}': {args.index} holds texts, which an image searches; give --image")
    args.searched = gallery.kind
    return Search(loaded, gallery, args.rerank, args.batch).find


def make_index(args: argparse.Namespace) -> None:
    """``predict index``."""
    texts = [] if args.texts is None else _read_texts(args.texts)
    names = texts or images_in(args.images)
    loaded = load(args.weights, PREDICTORS["retrieval"].model_class, args.device, args.dtype)
    faults: list[str] = []
    with progress(len(names), "text" if texts else "image") as bar:
        if texts:
            gallery = embed_texts(loaded, texts, args.batch, bar.update)
        else:
            gallery, faults = embed_images(loaded, args.images, names, args.batch, bar.update)
    save(gallery, Path(args.weights), args.out)
    print(f"{args.out}: {len(gallery.names)} {gallery.kind}")
    if faults:
        raise DataError(
            f"{args.images}: {len(faults)} of {len(names)} files could not be decoded; {args.out} has the others:\n  "
            + "\n  ".join([*faults[:_NUM_FAULTS_SHOWN], *["..."] * (len(faults) > _NUM_FAULTS_SHOWN)])
        )


def _read_texts(path: Path) -> list[str]:
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--texts {path}: cannot be read ({error}); name a UTF-8 file with one text a line"
        ) from error
    if not texts:
        raise ConfigError(f"--texts {path}: holds no text; write one a line")
    return texts


def rank(loaded: Loaded, images: list[Path], texts: list[str], batch: int, top: int) -> Answers:
    """Several images for a text, or several texts for an image, all of them fused.

    Raises:
        DataError: an image is missing, or none.
    """
    if len(texts) == 1:
        gallery, faults = embed_images(loaded, Path(), [str(path) for path in images], batch)
        if faults:
            raise DataError("; ".join(faults))
        return Search(loaded, gallery, len(images), batch).find(texts[0], top)
    gallery = embed_texts(loaded, texts, batch)
    return Search(loaded, gallery, len(texts), batch).find(images[0], top)


def answer_lines(
    args: argparse.Namespace, predictor: Predictor, find: Callable[[str | Path, int], Answers] | None
) -> None:
    """``--input``; see the module's text."""
    folder = args.input.parent
    how: Answerer[Any]
    if find is None:

        def row(given: dict[str, Any]) -> Any:
            return prepare(predictor.loaded, Row(images_of(given, predictor.num_images, folder), text_of(given)))

        how = Answerer(row, lambda rows: predictor.predict(rows, args.top), args.batch)
    else:

        def query(given: dict[str, Any]) -> str | Path:
            return text_of(given) if args.searched == "images" else images_of(given, 1, folder)[0]

        # One at a time: each is a batch of candidates, and one whose image is missing does not fail the others.
        how = Answerer(query, lambda queries: [find(queries[0], args.top)], 1)
    with progress(count_lines(args.input), "line") as bar:
        num_lines, faults = answer_file(args.input, args.output, how, bar.update)
    if not num_lines:
        raise DataError(f"--input {args.input}: holds no line; write one object a line")
    print(f"{args.output}: {num_lines - len(faults)} of {num_lines} lines answered")
    if faults:
        raise DataError(fault_message(args.input, args.output, num_lines, faults))


def progress(total: int, unit: str) -> Any:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())


def show(answers: Answers, args: argparse.Namespace) -> None:
    """Print answers, the best first."""
    if args.json:
        asked = {"image": [str(path) for path in args.image], "text": args.text}
        print(json.dumps({"task": args.task, "input": asked, "answers": answers}))
        return
    for answer in answers:
        numbers = {name: value for name, value in answer.items() if name in ("score", "match", "similarity")}
        words = [str(value) for name, value in answer.items() if name not in numbers]
        told = [
            f"{value:.4f}" if name == "score" else f"{name} {'-' if value is None else f'{value:.4f}'}"
            for name, value in numbers.items()
        ]
        print("  ".join(told + words))


if __name__ == "__main__":
    main()
