"""Command line of finetune.predict, and which of its arguments do not fit together.

Source: none.
"""

import argparse
from pathlib import Path

from finetune.task import Task
from finetune.tasks import TASKS, config_class
from unimo3.atomic_write import is_file_name
from unimo3.dtypes import DTYPES
from unimo3.errors import CommandParser, ConfigError


def parse_arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Command line; see ``--help``.

    Raises:
        ConfigError: arguments do not fit together; all errors in one message.
    """
    parser = CommandParser(
        prog="python -m finetune.predict", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = CommandParser(add_help=False)
    common.add_argument("--weights", required=True, help="folder that python -m pretrain.export wrote")
    common.add_argument("--batch", type=int, default=32, help="images, texts or pairs at a time (default: %(default)s)")
    common.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    common.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype to compute in (default: the weights' dtype; fp32 for fp16 weights on a CPU, with a notice)",
    )
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK", help=f"{', '.join(TASKS)}, index")
    tasks = {name: config_class(name).task for name in TASKS}
    for name, task in tasks.items():
        _add_task(commands.add_parser(name, parents=[common], help=(task.__doc__ or "").splitlines()[0]), task)
    index = commands.add_parser("index", parents=[common], help="Make an index that retrieval searches.")
    what = index.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, help="folder of images, with those below it")
    what.add_argument("--texts", type=Path, help="file with one text a line")
    index.add_argument("--out", type=Path, required=True, help="new folder of the index")
    args = parser.parse_args(argv)
    errors = [
        f"--{name} {value}: at least 1 is needed" for name in ("batch", "top") if (value := getattr(args, name, 1)) < 1
    ]
    errors += _query_errors(args, tasks[args.task]) if args.task in tasks else _index_errors(args)
    if errors:
        raise ConfigError(errors)
    return args


def _add_task(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file; repeat it for several")
    parser.add_argument("--text", action="append", default=[], help="question, statement, hypothesis or caption")
    parser.add_argument("--input", type=Path, help="JSON lines instead of --image and --text")
    parser.add_argument("--output", type=Path, help="JSON lines with the answers to --input")
    parser.add_argument("--top", type=int, default=5, help="answers to give (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--explain", type=Path, help="PNG file to write: where the words of one --text read its image, level by level"
    )
    if task.predictor.searches:
        parser.add_argument("--index", type=Path, help="folder that predict index wrote, to search in")
        parser.add_argument(
            "--rerank",
            type=int,
            help="candidates of the towers in --index that the fusion encoder puts in order; 0: none (default: 32)",
        )


def _index_errors(args: argparse.Namespace) -> list[str]:
    return [f"--out {args.out}: exists; choose a new folder"] if args.out.exists() else []


def _query_errors(args: argparse.Namespace, task: type[Task]) -> list[str]:
    """Return which arguments do not fit together, one line per error."""
    if args.input is not None:
        errors = [f"--input {args.input}: contains the inputs; leave out --image and --text"] * bool(
            args.image + args.text
        )
        if args.output is None:
            errors.append(f"--input {args.input}: needs --output, a file for the answers")
        elif args.output.resolve() == args.input.resolve():
            errors.append(f"--output {args.output}: is --input; name another file")
        elif not is_file_name(args.output):
            errors.append(f"--output {args.output}: cannot be written there; name a file in a folder that exists")
        elif args.output.exists() and not args.output.is_file():
            errors.append(
                f"--output {args.output}: is no plain file; name a file, which is replaced when it is complete"
            )
        if args.json:
            errors.append("--json: --output is JSON lines in any case; leave it out")
        return errors + _explain_errors(args) + _rerank_errors(args)
    errors = [f"--output {args.output}: is for --input; leave it out, or redirect --json"] * (args.output is not None)
    num_images, num_texts = len(args.image), len(args.text)
    if not task.predictor.searches:
        if num_images != task.num_images:
            errors.append(f"--image: given {num_images} times; {args.task} takes {task.num_images}")
        if num_texts != 1:
            errors.append(f"--text: given {num_texts} times; {args.task} takes one")
    elif args.index is not None:
        if num_images + num_texts != 1:
            errors.append(
                f"--index {args.index}: needs one --text, or one --image; {num_texts} and {num_images} are given"
            )
    elif not num_images or not num_texts or min(num_images, num_texts) > 1:
        errors.append(
            f"--image and --text: given {num_images} and {num_texts} times; {args.task} takes one of each, several "
            "of one to rank for the other, or --index"
        )
    return errors + _explain_errors(args) + _rerank_errors(args)


def _explain_errors(args: argparse.Namespace) -> list[str]:
    path: Path | None = args.explain
    if path is None:
        return []
    searches = getattr(args, "index", None) is not None or len(args.text) > 1
    errors = []
    if args.input is not None or searches or (args.task == "retrieval" and len(args.image) > 1):
        errors.append(f"--explain {path}: explains one text with its image; leave it out, or ask for one pair")
    if path.suffix.lower() != ".png":
        errors.append(f"--explain {path}: is a PNG file; end its name in .png")
    if not is_file_name(path):
        errors.append(f"--explain {path}: cannot be written there; name a file in a folder that exists")
    return errors


def _rerank_errors(args: argparse.Namespace) -> list[str]:
    if getattr(args, "rerank", None) is None or args.index is not None:
        return []
    return [f"--rerank {args.rerank}: is for --index; without it all inputs are fused, leave it out"]
