"""Lists, verifies and prunes a run's checkpoints, and copies them to an object store and back."""

import argparse
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

from unimo3 import config
from unimo3.checkpoint import store
from unimo3.checkpoint.state import TrainState
from unimo3.checkpoint.stored_run import NUM_JOBS, folder_or_url
from unimo3.errors import CheckpointError, CommandParser, ConfigError, exit_with_status, no_answer
from unimo3.object_store import is_store
from unimo3.training.heartbeat import lock_run, other_process

if TYPE_CHECKING:
    from unimo3.checkpoint.push import Retention
    from unimo3.checkpoint.stored_run import StoredRun

log = logging.getLogger(__name__)


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
        of_store = "" if name == "prune" else ", or the URL of its copy in an object store"
        command.add_argument("run", type=Path if name == "prune" else folder_or_url, help=f"folder of a run{of_store}")
    _add_retention(command)
    _add_copies(commands)
    return parser.parse_args(argv)


def _add_copies(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    about = "copy a run to an object store: what is seen there is complete or absent; the same command continues"
    push = commands.add_parser("push", help="copy a run to an object store", description=about)
    push.add_argument("run", type=Path, help="folder of a run")
    push.add_argument("url", metavar="URL", help="where to, such as s3://BUCKET/runs/base")
    push.add_argument(
        "--follow",
        action="store_true",
        help="copy each new checkpoint and remove old ones there, until the run is complete, Ctrl-C or SIGTERM",
    )
    push.add_argument("--every", type=float, default=30.0, help="seconds between looks at RUN (default: %(default)s)")
    push.add_argument("--tag", help="copy this checkpoint only, such as step_00001000, or best (default: all)")
    _add_retention(push, " there with --follow")
    about = "copy a run's newest good checkpoint, and what else a resume reads, from an object store to a folder"
    pull = commands.add_parser("pull", help="copy a run from an object store", description=about)
    pull.add_argument("url", metavar="URL", help="of a run that push has copied")
    pull.add_argument("run", type=Path, help="new folder, or that of an older state of the same run")
    pull.add_argument("--tag", help="checkpoint, such as step_00001000, or best (default: the newest good one)")
    for command in (push, pull):
        command.add_argument("--jobs", type=int, default=NUM_JOBS, help="files copied at a time (default: %(default)s)")


def _add_retention(command: argparse.ArgumentParser, where: str = "") -> None:
    default = "default: as the run's config"
    command.add_argument("--keep-last", type=int, help=f"newest ones to keep{where}, at least 1 ({default})")
    command.add_argument("--keep-every", type=int, help=f"keep multiples of this many steps{where} ({default})")


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """``ls``, ``verify``, ``prune``, ``push`` or ``pull`` a run."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if args.command == "push":
        push(args)
    elif args.command == "pull":
        pull(args)
    elif isinstance(args.run, str):
        from unimo3.checkpoint.stored_run import StoredRun

        list_stored(StoredRun(args.run), args.command == "verify")
    else:
        work_on_folder(args)


def work_on_folder(args: argparse.Namespace) -> None:
    """``ls``, ``verify`` or ``prune`` a folder."""
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


def push(args: argparse.Namespace) -> None:
    """Copy a run to an object store.

    Raises:
        CheckpointError: a checkpoint is damaged, and so not copied; the others are.
    """
    check_copy(args)
    from unimo3.checkpoint.push import Pusher

    with stopped_by_signals() as stop:
        if args.follow and not (args.run / "config.yaml").is_file():
            log.warning("%s: has no config.yaml yet; waiting for the run to begin", args.run)
            while not (args.run / "config.yaml").is_file():
                if stop.wait(args.every):
                    return
        pusher = Pusher(args.run, args.url, args.jobs, stop)
        if args.follow:
            problems = pusher.follow(lambda: newest_retention(args), args.every, lambda: has_ended(args.run))
        else:
            problems = pusher.push(args.tag)
    if problems:
        raise CheckpointError(
            f"{args.run}: {len(problems)} damaged checkpoints are not copied: {'; '.join(problems)}; see "
            "python -m pretrain.checkpoints verify"
        )


def pull(args: argparse.Namespace) -> None:
    """Copy a run from an object store."""
    check_copy(args)
    from unimo3.checkpoint import pull as puller

    tags = puller.pull(args.url, args.run, args.tag, args.jobs, lock_run)
    print(f"{args.run}: has {', '.join(tags)} of {args.url}; the training command resumes from the newest")


def check_copy(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, all at once.

    Raises:
        ConfigError: the URL is none of a store, or a number is too low.
    """
    errors = []
    if not is_store(args.url):
        errors.append(f"{args.url}: is no URL of an object store; name one such as s3://BUCKET/runs/base")
    if args.jobs < 1:
        errors.append(f"--jobs {args.jobs}: at least 1 is needed")
    if args.command == "push" and not args.every > 0:
        errors.append(f"--every {args.every}: a number of seconds above 0 is needed")
    if args.command == "push" and args.follow and args.tag is not None:
        errors.append(f"--tag {args.tag}: --follow copies all checkpoints; leave out one of the two")
    if errors:
        raise ConfigError(errors)


def newest_retention(args: argparse.Namespace) -> "Retention":
    """What stays: of the command line, else of the settings that the newest checkpoint was saved with."""
    from unimo3.checkpoint.push import Retention

    settings = {}
    for folder in reversed(store.list_checkpoints(args.run)):
        try:
            settings = TrainState.read(folder / store.STATE).extra.get("settings", {})
            break
        except CheckpointError:  # removed meanwhile, or damaged
            continue
    return Retention(*retention(args, settings))


def has_ended(run: Path) -> bool:
    """Whether a run has done all its steps, and no process writes to its folder."""
    steps = config.read_flat(run / "config.yaml").get("training.steps")
    newest = store.list_checkpoints(run)[-1:]
    return bool(newest) and steps is not None and store.step_of(newest[0]) >= steps and other_process(run) is None


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the process."""
    stop = Event()

    def set_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, set_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def list_stored(remote: "StoredRun", verifies: bool) -> None:
    """Print the checkpoints of a run's copy in a store.

    Raises:
        CheckpointError: there is none, or one is damaged.
    """
    tags = remote.tags()
    if not tags:
        raise CheckpointError(f"{remote.url}: has no complete checkpoint; name the URL of a run that push has copied")
    damaged = []
    for tag in tags:
        size = sum(stored.num_bytes for stored in remote.files_of(tag).values())
        problems = remote.verify(tag) if verifies else []
        condition = ("DAMAGED: " + "; ".join(problems) if problems else "good") if verifies else f"{size / 1e6:.1f} MB"
        print(f"{tag}  {condition}", flush=True)
        damaged += [tag] if problems else []
    for tag in remote.begun():
        if tag not in tags:
            print(f"{tag}  incomplete: a push is at work or was ended; the same push continues")
    if damaged:
        raise CheckpointError(f"{remote.url}: {', '.join(damaged)}: damaged; delete them there, and push the run again")


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


def retention(args: argparse.Namespace, newest: dict[str, Any] | None = None) -> tuple[int, int]:
    """How many of the newest, and every how many steps, to keep: from the command line, else from the run's config.

    Args:
        newest: settings that replace those of the run's config.

    Raises:
        ConfigError: neither sets it, or it is too low.
    """
    path = args.run / "config.yaml"
    settings = (config.read_flat(path) if path.is_file() else {}) | (newest or {})
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
