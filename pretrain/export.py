"""A run's sharded checkpoint -> inference weights for ``from_pretrained``."""

import argparse
import re
import shutil
from pathlib import Path

from unimo3.checkpoint import store
from unimo3.checkpoint.export import DTYPES, copy_model_files, export_weights
from unimo3.errors import CheckpointError, ConfigError, exit_with_status

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="new folder for weights, configuration and tokenizer")
    parser.add_argument("--tag", help="checkpoint, such as step_00001000 (default: the newest good one)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="type of the weights (default: fp16)")
    parser.add_argument(
        "--on-overflow", choices=("error", "clamp", "keep-fp32"), default="error",
        help="values that do not fit the type (default: error, which names the tensor)",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="1GB", help="largest weights file (default: %(default)s)")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Export into a staging folder, then rename it."""
    args = parse_arguments(argv)
    size = re.fullmatch(r"(\d+)\s*([KMG]?B?)", args.max_shard_size.upper())
    faults = []
    if not args.run.is_dir():
        faults.append(f"run {args.run}: no such folder")
    if args.out.exists():
        faults.append(f"--out {args.out}: exists; choose a new folder")
    if size is None or size[2] not in _UNITS or int(size[1]) == 0:
        faults.append(f"--max-shard-size {args.max_shard_size}: a size such as 500MB or 1GB is needed")
    if faults:
        raise ConfigError(faults)
    assert size is not None
    checkpoint = choose_checkpoint(args.run, args.tag)
    staging = args.out.with_name(args.out.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        reports = export_weights(checkpoint, staging, args.dtype, args.on_overflow, int(size[1]) * _UNITS[size[2]])
        copy_model_files(args.run / "model", staging, args.dtype)
    except BaseException:
        shutil.rmtree(staging)
        raise
    staging.rename(args.out)
    flushed = sum(report.num_flushed for report in reports)
    largest = max(reports, key=lambda report: report.largest)
    print(f"{args.out}: {len(reports)} tensors of {checkpoint} as {args.dtype}")
    print(
        f"largest magnitude {largest.largest:.4g} in {largest.name}; {flushed} values became zero; export_report.json"
    )


def choose_checkpoint(run: Path, tag: str | None) -> Path:
    """The checkpoint to export, verified.

    Raises:
        CheckpointError: there is none, or the named one is missing or damaged.
    """
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


if __name__ == "__main__":
    main()
