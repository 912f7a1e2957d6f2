"""Lists, verifies and prunes a run's checkpoints."""

import argparse
import logging
from pathlib import Path

from unimo3 import config
from unimo3.checkpoint import store
from unimo3.checkpoint.state import TrainState
from unimo3.errors import CheckpointError, CommandParser, ConfigError, exit_with_status, no_answer


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("ls", "list committed checkpoints"),
        ("verify", "compare every file with its manifest"),
        ("prune", "remove old checkpoints; the newest good one always stays"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("run", type=Path, help="folder of a run")
    command.add_argument("--keep-last", type=int, help="newest ones to keep, at least 1 (default: as the run's config)")
    command.add_argument("--keep-every", type=int, help="keep multiples of this many steps (default: the same)")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """``ls``, ``verify`` or ``prune`` a run."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if not args.run.is_dir():
        raise CheckpointError(f"{args.run}: no such folder; name the folder of a run")
    checkpoints, quarantined = store.list_folders(args.run), store.quarantined_folders(args.run)
    if not checkpoints and not quarantined:
        raise CheckpointError(f"{args.run}: has no committed checkpoint in {store.folder_of(args.run)}")
    if args.command == "ls":
        for folder in checkpoints:
            print(describe(folder))
        for folder in quarantined:
            print(f"{folder.name}  quarantined as damaged; verify reports why")
    elif args.command == "verify":
        verify(checkpoints, quarantined)
    else:
        keep_last, keep_every = retention(args)
        try:
            removed = store.prune(args.run, keep_last, keep_every)
        except OSError as error:
            raise CheckpointError(f"{args.run}: checkpoints cannot be removed ({error}); prune again") from error
        for folder in removed:
            print(f"removed {folder}")
        print(f"{len(removed)} removed, {len(checkpoints) - len(removed)} retained")


# A run that trains meanwhile removes old ones.
_REMOVED = "removed meanwhile"


def describe(folder: Path) -> str:
    """One line on a checkpoint."""
    try:
        line = _describe(folder)
    except FileNotFoundError:
        if folder.exists():
            raise
        line = ""
    return line if folder.exists() else f"{folder.name}  {_REMOVED}"


def _describe(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not (folder / store.MANIFEST).is_file():
        return f"{folder.name}  DAMAGED: has no {store.MANIFEST}"
    try:
        state = TrainState.read(folder / store.STATE)
    except CheckpointError as error:
        if no_answer(error):
            raise  # of the storage
        return f"{folder.name}  DAMAGED: {error}"
    ranks = f"{state.world_size} rank{'s' if state.world_size > 1 else ''}"
    return f"{folder.name}  {ranks}  {state.samples_consumed} samples  {size / 1e6:.1f} MB"


def verify(checkpoints: list[Path], quarantined: list[Path]) -> None:
    """Print each one's condition.

    Raises:
        CheckpointError: one is damaged that is not quarantined.
    """
    for folder in quarantined:
        print(f"{folder.name}  quarantined: {'; '.join(store.verify(folder)) or 'good now; rename it to use it'}")
    damaged = []
    for folder in checkpoints:
        problems = store.verify(folder)
        is_removed = bool(problems) and not folder.exists()
        condition = _REMOVED if is_removed else "DAMAGED: " + "; ".join(problems) if problems else "good"
        print(f"{folder.name}  {condition}", flush=True)
        if problems and not is_removed:
            damaged.append(folder.name)
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(checkpoints)} checkpoints are damaged: {', '.join(damaged)}; "
            + (
                "a run resumes from the newest good one by itself"
                if len(damaged) < len(checkpoints)
                else "none is good, and the run would exit with status 78: copy a good one back"
            )
        )


def retention(args: argparse.Namespace) -> tuple[int, int]:
    """How many of the newest, and every how many steps, to keep: from the command line, else from the run's config.

    Raises:
        ConfigError: neither sets it, or it is too low.
    """
    path = args.run / "config.yaml"
    settings = config.read_flat(path) if path.is_file() else {}
    keep_last = args.keep_last if args.keep_last is not None else settings.get("checkpoint.keep_last")
    keep_every = args.keep_every if args.keep_every is not None else settings.get("checkpoint.keep_every", 0)
    errors = []
    if keep_last is None:
        errors.append(f"--keep-last: not given, and {path} does not set it; give a number, at least 1")
    elif keep_last < 1:
        errors.append(f"--keep-last {keep_last}: at least 1 is needed to resume")
    if keep_every < 0:
        errors.append(f"--keep-every {keep_every}: 0 (none) or a number of steps is needed")
    if errors:
        raise ConfigError(errors)
    assert keep_last is not None
    return keep_last, keep_every


if __name__ == "__main__":
    main()
