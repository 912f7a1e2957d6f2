"""A run's sharded checkpoint -> inference weights for ``from_pretrained``."""

import argparse
import logging
import re
from pathlib import Path

from unimo3.checkpoint import store
from unimo3.checkpoint.export import DTYPES, TensorReport, export_run
from unimo3.errors import CheckpointError, CommandParser, ConfigError, exit_with_status

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="new folder for weights, configuration and tokenizer")
    parser.add_argument("--tag", help="checkpoint, such as step_00001000 (default: the newest good one)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="type of the weights (default: fp16)")
    parser.add_argument(
        "--on-overflow", choices=("error", "clamp", "keep-fp32"), default="error",
        help="values that do not fit the type (default: error, which names the tensors)",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="1GB", help="largest weights file (default: %(default)s)")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Choose a checkpoint, verify it, export it."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    size = re.fullmatch(r"(\d+)\s*([KMG]?B?)", args.max_shard_size.strip().upper())
    faults = []
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        faults.append(f"--out {args.out}: exists and is no empty folder; choose a new one")
    if size is None or size[2] not in _UNITS or int(size[1]) == 0:
        faults.append(f"--max-shard-size {args.max_shard_size}: a size such as 500MB or 1GB is needed")
    if faults:
        raise ConfigError(faults)
    assert size is not None
    checkpoint = choose_checkpoint(args.run, args.tag)
    max_file_bytes = int(size[1]) * _UNITS[size[2]]
    reports = export_run(args.run, checkpoint, args.out, args.dtype, args.on_overflow, max_file_bytes)
    print(summary(args.out, checkpoint, args.dtype, reports))


def choose_checkpoint(run: Path, tag: str | None) -> Path:
    """The checkpoint to export, verified.

    Raises:
        CheckpointError: there is none, or the named one is missing or damaged.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; name the folder of a run")
    if tag is None:
        newest = store.newest_good(run)
        if newest is None:
            raise CheckpointError(
                f"{run}: has no good checkpoint in {store.folder_of(run)}; let it train to its first save"
            )
        return newest
    folder = store.folder_of(run) / tag
    if folder not in store.list_checkpoints(run):
        known = ", ".join(path.name for path in store.list_checkpoints(run)) or "none"
        raise CheckpointError(f"--tag {tag}: no such checkpoint in {store.folder_of(run)}; there are: {known}")
    problems = store.verify(folder)
    if problems:
        raise CheckpointError(
            f"{folder}: is damaged ({'; '.join(problems)}); leave out --tag to take the newest good one"
        )
    return folder


def summary(out: Path, checkpoint: Path, dtype: str, reports: list[TensorReport]) -> str:
    """A few lines on what was written."""
    files = sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    largest = max(reports, key=lambda report: report.largest)
    lines = [
        f"{out}: {len(reports)} tensors of {checkpoint} as {dtype}, {size / 1e6:.1f} MB in {len(files)} "
        f"file{'s' if len(files) > 1 else ''}",
        f"largest magnitude {largest.largest:.4g} in {largest.name}; "
        f"{sum(report.num_flushed for report in reports)} values became zero; see export_report.json",
    ]
    for report in reports:
        if report.num_over_range:
            fate = "kept in float32" if report.dtype == "float32" else "clamped"
            lines.append(f"{report.name}: {report.num_over_range} values out of range, {fate}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
