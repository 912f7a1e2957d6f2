"""A run's sharded checkpoint, or a DeepSpeed ZeRO folder of another program -> inference weights in safetensors.

For a run, ``from_pretrained`` loads the folder. For a checkpoint without a run (the folder with the
``*_optim_states.pt`` files, or its parent with ``latest``), it has weights, index and report only.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unimo3.checkpoint import store
from unimo3.checkpoint.best_record import BEST, read_best
from unimo3.checkpoint.load import newest_good
from unimo3.checkpoint.stored_run import folder_or_url
from unimo3.dtypes import DTYPES
from unimo3.errors import CheckpointError, CommandParser, ConfigError, exit_with_status

if TYPE_CHECKING:
    from unimo3.checkpoint.casting import TensorReport

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MAX_NAME_BYTES = 255  # of Linux's file systems
_ZERO_FILES = "*_optim_states.pt"


@dataclass(frozen=True)
class ExportSource:
    """What to export.

    Attributes:
        run: gives configuration and tokenizer; None if the checkpoint came without one.
        checkpoint: its folder.
    """

    run: Path | None
    checkpoint: Path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.export", description=__doc__)
    parser.add_argument(
        "run",
        type=folder_or_url,
        help="folder of a run, or of a checkpoint that DeepSpeed's ZeRO wrote; or the URL to which "
        "pretrain.checkpoints push has copied a run, whose checkpoint is first pulled to OUT.source",
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for weights, configuration and tokenizer")
    parser.add_argument(
        "--tag",
        help="checkpoint, such as step_00001000, or best: the one RUN/best.json names (default: the newest good one)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="type of the weights (default: fp16)")
    parser.add_argument(
        "--on-overflow",
        choices=("error", "clamp", "keep-fp32"),
        default="error",
        help="values that do not fit the type (default: error, which names the tensors)",
    )
    parser.add_argument("--max-shard-size", default="1GB", help="largest weights file (default: %(default)s)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the files back and compare them with the report (default: yes)",
    )
    parser.add_argument("--jobs", type=int, help="tensors processed at a time (default: two a core, at most 8)")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Choose a checkpoint, verify it, export it."""
    # Otherwise the collector walks all of torch's objects again when the process ends: a third of a second.
    atexit.register(gc.freeze)
    args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    max_file_bytes = check(args)
    source = Path(f"{args.out.resolve()}.source")
    if isinstance(args.run, str):
        from unimo3.checkpoint.pull import pull
        from unimo3.object_store import check_url

        check_url(args.run)  # before it is printed
        print(f"{args.run}: pulled to {source}, which the end of the export removes", flush=True)
        (pulled, *_) = pull(args.run, source, args.tag, takes_best=False)
        choice = choose_checkpoint(source, pulled)
    else:
        choice = choose_checkpoint(args.run, args.tag)
    from unimo3.checkpoint.export import export_run

    reports = export_run(
        choice.run,
        choice.checkpoint,
        args.out,
        args.dtype,
        args.on_overflow,
        max_file_bytes,
        num_jobs=args.jobs,
        verify=args.verify,
    )
    if isinstance(args.run, str):
        shutil.rmtree(source)
    print(summary(args.out, choice, args.dtype, reports))


def check(args: argparse.Namespace) -> int:
    """Refuse what cannot work, all at once, before anything is read.

    Returns:
        The largest size of a weights file in bytes.
    """
    size = re.fullmatch(r"(\d+)\s*([KMG]?B?)", args.max_shard_size.strip().upper())
    errors = []
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        errors.append(f"--out {args.out}: exists and is no empty folder; choose a new one")
    if size is None or size[2] not in _UNITS or int(size[1]) == 0:
        errors.append(f"--max-shard-size {args.max_shard_size}: a size such as 500MB or 1GB is needed")
    if args.jobs is not None and args.jobs < 1:
        errors.append(f"--jobs {args.jobs}: at least 1 is needed")
    if errors:
        raise ConfigError(errors)
    assert size is not None
    return int(size[1]) * _UNITS[size[2]]


def choose_checkpoint(run: Path, tag: str | None, *, verify: bool = True) -> ExportSource:
    """The checkpoint to export, verified if it has a manifest.

    Args:
        verify: without it a run's checkpoints are not read, and a damaged one may be chosen.

    Raises:
        CheckpointError: there is none, or the named one is missing or damaged.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; name the folder of a run")
    if not store.folder_of(run).is_dir() and (any(run.glob(_ZERO_FILES)) or (run / "latest").is_file()):
        return ExportSource(None, _zero_folder(run, tag))
    if tag is None:
        newest = newest_good(run) if verify else next(reversed(store.list_checkpoints(run)), None)
        if newest is None:
            raise CheckpointError(
                f"{run}: has no good checkpoint in {store.folder_of(run)}; "
                + ("copy a good one back" if store.has_folders(run) else "let it train to its first save")
            )
        return ExportSource(run, newest)
    if tag == "best":
        best = read_best(run)
        if best is None:
            raise CheckpointError(
                f"--tag best: {run / BEST} names none, which fine-tuning does with best.keep and a data.val that is no "
                "test split; leave --tag out for the newest"
            )
        tag = best.tag
    folder = store.folder_of(run) / tag
    if folder not in store.list_checkpoints(run):
        known = ", ".join(path.name for path in store.list_checkpoints(run)) or "none"
        raise CheckpointError(f"--tag {tag}: no such checkpoint in {store.folder_of(run)}; there are: {known}")
    if verify:
        _refuse_damaged(folder, "leave out --tag to take the newest good one")
    return ExportSource(run, folder)


def _zero_folder(folder: Path, tag: str | None) -> Path:
    """A ZeRO checkpoint's folder: this one, or the one below it that `tag` or the file ``latest`` names."""
    if not any(folder.glob(_ZERO_FILES)):
        origin = "--tag" if tag is not None else f"{folder / 'latest'}"
        tag = tag if tag is not None else (folder / "latest").read_text(errors="replace").strip()
        if tag in ("", ".", "..") or "/" in tag or "\0" in tag or len(os.fsencode(tag)) > _MAX_NAME_BYTES:
            raise CheckpointError(f"{origin}: {tag[:_MAX_NAME_BYTES]!r} is no name of a folder in {folder}")
        folder = folder / tag
        if not any(folder.glob(_ZERO_FILES)):
            raise CheckpointError(f"{origin}: {folder} contains no {_ZERO_FILES} files of DeepSpeed's ZeRO")
    elif tag is not None:
        raise CheckpointError(f"--tag {tag}: {folder} is one checkpoint itself; leave out --tag")
    if (folder / store.STATE).is_file() or (folder / store.MANIFEST).is_file():
        _refuse_damaged(folder, "take another checkpoint")
    return folder


def _refuse_damaged(folder: Path, fix: str) -> None:
    problems = store.verify(folder)
    if problems and not folder.exists():
        raise CheckpointError(f"{folder}: was removed meanwhile, as by a run that trains; {fix}")
    if problems:
        raise CheckpointError(f"{folder}: is damaged ({'; '.join(problems)}); {fix}")


def summary(out: Path, choice: ExportSource, dtype: str, reports: list[TensorReport]) -> str:
    """A few lines on what was written."""
    files = sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    largest = max(reports, key=lambda report: report.largest)
    lines = [
        f"{out}: {len(reports)} tensors of {choice.checkpoint} as {dtype}, {size / 1e6:.1f} MB in {len(files)} "
        f"file{'s' if len(files) > 1 else ''}",
        f"largest magnitude {largest.largest:.4g} in {largest.name}; "
        f"{sum(report.num_flushed for report in reports)} values became zero; see export_report.json",
    ]
    if choice.run is None:
        lines.append("no run's folder was given: weights, index and report only, no configuration and no tokenizer")
    for report in reports:
        if report.num_over_range:
            fate = "written in float32" if report.dtype == "float32" else "clamped"
            lines.append(f"{report.name}: {report.num_over_range} values out of range, {fate}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
