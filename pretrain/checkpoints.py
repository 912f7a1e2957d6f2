"""Lists, verifies and prunes a run's checkpoints."""

import argparse
from pathlib import Path

from unimo3.checkpoint import store
from unimo3.checkpoint.state import TrainState
from unimo3.errors import CheckpointError, ConfigError, exit_with_status


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """``ls``, ``verify`` or ``prune`` a run."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("ls", "list committed checkpoints"),
        ("verify", "compare every file with its manifest"),
        ("prune", "remove old checkpoints"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("run", type=Path, help="folder of a run")
        if name == "prune":
            command.add_argument("--keep-last", type=int, required=True, help="newest ones to keep, at least 1")
            command.add_argument("--keep-every", type=int, default=0, help="keep multiples of this many steps")
    args = parser.parse_args(argv)
    checkpoints = store.list_checkpoints(args.run)
    if not checkpoints:
        raise CheckpointError(f"{args.run}: has no committed checkpoint in {store.folder_of(args.run)}")
    if args.command == "ls":
        for folder in checkpoints:
            state = TrainState.read(folder / store.STATE)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{folder.name}  {state.world_size} ranks  {state.samples_consumed} samples  {size / 1e6:.1f} MB")
    elif args.command == "verify":
        _verify(checkpoints)
    else:
        if args.keep_last < 1:
            raise ConfigError(f"--keep-last {args.keep_last}: at least 1 must be kept, or nothing could resume")
        for folder in store.prune(args.run, args.keep_last, args.keep_every):
            print(f"removed {folder}")


def _verify(checkpoints: list[Path]) -> None:
    damaged = []
    for folder in checkpoints:
        problems = store.verify(folder)
        print(f"{folder.name}  {'good' if not problems else 'DAMAGED: ' + '; '.join(problems)}")
        if problems:
            damaged.append(folder.name)
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(checkpoints)} checkpoints are damaged: {', '.join(damaged)}")


if __name__ == "__main__":
    main()
