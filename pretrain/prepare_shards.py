"""Public data sets -> WebDataset shards with an index, one folder a split.

Under mpirun or srun the ranks share the work. A conversion that was killed goes on when it is started again.
"""

import argparse
import json
import logging
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unimo3.data.answers import AnswerVocabulary
from unimo3.data.formats import CONVERTERS
from unimo3.data.formats.record import Sample
from unimo3.data.formats.vqav2 import answer_vocabulary, normalized_choices
from unimo3.data.index import INDEX, Shard, ShardIndex
from unimo3.data.ranks import communicator, spread
from unimo3.data.shards import (
    ImageOptions,
    ShardDone,
    ShardJob,
    clear,
    cut,
    fault_of,
    finish,
    index_tar,
    members_fault,
    remove_strangers,
    remove_traces,
    write_shard,
)
from unimo3.data.tokenizer import train_tokenizer
from unimo3.errors import CommandParser, ConfigError, DataError, Unimo3Error, exit_with_status

log = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"
# Rejects, beyond twice the share, after which a conversion need not be finished to know.
_HOPELESS = 100
_REPORT_EVERY_S = 30.0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m pretrain.prepare_shards", description=__doc__)
    parser.add_argument(
        "format", choices=[*sorted(CONVERTERS), "index"],
        help="the source's format; index: tars that are shards already get an index beside them",
    )  # fmt: skip
    parser.add_argument("--src", type=Path, help="folder of the data set's annotation files; index: of the tars")
    parser.add_argument("--images", type=Path, help="folder of the images, as docs/data.md says (default: --src)")
    parser.add_argument("--out", type=Path, help="new folder for the shards")
    parser.add_argument("--shard-size", type=int, default=1024, help="records a shard (default: %(default)s)")
    parser.add_argument(
        "--max-side", type=int, default=0, metavar="PIXELS",
        help="scale larger images to this by their longer side, as JPEG (default: store images as they are)",
    )  # fmt: skip
    parser.add_argument("--quality", type=int, default=95, help="of that JPEG, 1 to 95 (default: %(default)s)")
    parser.add_argument(
        "--max-reject-share", type=float, default=0.001, metavar="SHARE",
        help="of records without a usable image, past which the command ends with status 78 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-vocab", type=int, default=0, metavar="N",
        help="coco: also train a byte-level BPE of N entries on the training captions, into OUT/tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--min-answer-count", type=int, default=9, metavar="N",
        help="vqav2: answers given at least N times form OUT/answers.json (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--verify", action="store_true",
        help="convert nothing: read every shard of OUT again and compare it with its index",
    )  # fmt: skip
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, all at once, before anything is read."""
    faults = []
    needed = {"src"} if args.format == "index" else {"out"} if args.verify else {"src", "out"}
    for name in ("src", "images"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            faults.append(f"--{name} {folder}: no such folder")
    faults += [f"--{name}: not given; {_WHY[name]}" for name in sorted(needed) if getattr(args, name) is None]
    if args.format == "index" and args.out is not None:
        faults.append(f"--out {args.out}: an index is written beside the tars of --src; leave it out")
    elif args.verify and args.out is not None and not args.out.is_dir():
        faults.append(f"--out {args.out}: no such folder")
    elif not args.verify and args.out is not None and args.out.exists():
        if not args.overwrite:
            faults.append(f"--out {args.out}: exists; choose a new folder or give --overwrite")
        elif not is_output(args.out):
            faults.append(f"--out {args.out}: holds other things than shards; --overwrite removes only what this wrote")
    if args.shard_size < 1:
        faults.append(f"--shard-size {args.shard_size}: at least 1 is needed")
    if args.max_side < 0:
        faults.append(f"--max-side {args.max_side}: a number of pixels, or 0 to store images as they are")
    if not 1 <= args.quality <= 95:
        faults.append(f"--quality {args.quality}: 1 to 95 is needed")
    if not 0 <= args.max_reject_share < 1:
        faults.append(f"--max-reject-share {args.max_reject_share}: at least 0 and below 1 is needed")
    if args.min_answer_count < 1:
        faults.append(f"--min-answer-count {args.min_answer_count}: at least 1 is needed")
    if args.tokenizer_vocab and args.format != "coco":
        faults.append(f"--tokenizer-vocab {args.tokenizer_vocab}: only coco has captions to train on")
    if args.tokenizer_vocab and args.tokenizer_vocab < 300:
        faults.append(f"--tokenizer-vocab {args.tokenizer_vocab}: at least 300 (256 bytes and the special tokens)")
    if faults:
        raise ConfigError(faults)


_WHY = {"src": "name the folder of the annotation files, or of the tars", "out": "name the folder of the shards"}


def is_output(folder: Path) -> bool:
    """Whether a folder is what an earlier run wrote: splits with their index, and what goes beside, nothing else."""
    beside = ("tokenizer", "answers.json", REJECTS)
    return folder.is_dir() and all(path.name in beside or (path / INDEX).is_file() for path in folder.iterdir())


class Source:
    """The records of a data set, and what is learned of them on the way."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.captions: list[str] = []
        self.choices: Counter[str] = Counter()
        self.omitted: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()

    def jobs(self) -> Iterator[ShardJob]:
        """All shards to be written.

        Raises:
            DataError: a record is at fault, or there is none.
        """
        for job in cut(self._records(), self._args.shard_size):
            self.shards[job.split] += 1
            yield job
        if not self.shards:
            raise DataError(f"--src {self._args.src}: holds no records of {self._args.format}")

    def _records(self) -> Iterator[tuple[str, Sample]]:
        args, seen = self._args, set()
        for split, sample in CONVERTERS[args.format](args.src, args.images or args.src, self.omitted):
            if (split, sample.key) in seen:
                raise DataError(
                    f"{sample.images[0]}: '{sample.key}' stands twice in the source's split {split}; remove one record"
                )
            seen.add((split, sample.key))
            if "questions" in sample.content:
                self.choices.update(normalized_choices(sample))
            elif split == "train" and args.tokenizer_vocab:
                self.captions.extend(sample.content["captions"])
            yield split, sample

    def write_vocabularies(self, folder: Path) -> None:
        """Write the tokenizer and the answers, where they are asked for."""
        args = self._args
        if args.tokenizer_vocab:
            size = train_tokenizer(self.captions, args.tokenizer_vocab, folder / "tokenizer")
            print(f"tokenizer: {size} entries from {len(self.captions)} captions")
        if self.choices:
            answers = answer_vocabulary(self.choices, args.min_answer_count)
            if not answers:
                (most, count), *_ = self.choices.most_common(1)
                raise DataError(
                    f"--min-answer-count {args.min_answer_count}: no answer is given that often (the most frequent, "
                    f"{most!r}, {count} times); lower it"
                )
            AnswerVocabulary(answers).save(folder / "answers.json")
            print(f"answers.json: {len(answers)} answers of {len(self.choices)}")


class Progress:
    """Counts what is done, and says so in the log every half a minute."""

    def __init__(self, unit: str):
        self.done = 0
        self.num_shards = 0
        self.rejects: list[dict[str, Any]] = []
        self._unit = unit
        self._reused = 0
        self._started = self._shown = time.monotonic()

    def add(self, result: ShardDone) -> None:
        """Count a shard."""
        self.done += result.num_records
        self.num_shards += 1
        self._reused += result.num_records if result.reused else 0
        self.rejects += [asdict(reject) for reject in result.rejects]
        if time.monotonic() - self._shown > _REPORT_EVERY_S:
            self.show()

    def show(self) -> None:
        """Say how far it is."""
        self._shown = time.monotonic()
        rate = (self.done - self._reused) / max(self._shown - self._started, 1e-9)
        log.info(
            "%d shards, %d %s (%d were there already), %.0f a second, %d rejected",
            self.num_shards, self.done, self._unit, self._reused, rate, len(self.rejects),
        )  # fmt: skip


def convert(args: argparse.Namespace, comm: Any) -> None:
    """Convert into a staging folder, then rename it; every rank calls it."""
    staging = args.out.with_name(args.out.name + ".partial")
    options = ImageOptions(args.max_side, args.quality)
    source, progress = Source(args), Progress("records")

    def take(result: ShardDone) -> None:
        progress.add(result)
        # Early only where no order in which shards come could mend it.
        if len(progress.rejects) > _HOPELESS + 2 * args.max_reject_share * progress.done:
            check_rejects(args, progress, staging)

    def work(job: ShardJob, between: Any) -> ShardDone:
        return write_shard(job, staging, options, between)

    if comm is not None and comm.rank > 0:
        spread(comm, iter(()), work, take)
        return
    lock = FileLock(f"{staging}.lock", timeout=0)
    try:
        held = lock.acquire()
        staging.mkdir(parents=True, exist_ok=True)
    except (Timeout, OSError) as error:
        # The others wait for jobs: they are told through the same channel.
        reason = "another process is writing there" if isinstance(error, Timeout) else f"cannot be made ({error})"
        spread(comm, _fails(ConfigError(f"--out {args.out}: {reason}")), work, take)
        return
    with held, _kept_if_filled(staging):
        spread(comm, source.jobs(), work, take)
        progress.show()
        check_rejects(args, progress, staging)
        for path in staging.iterdir():
            if path.name not in source.shards:  # of an earlier attempt with other arguments
                clear(path) if path.is_dir() else path.unlink()
        if progress.rejects:
            write_rejects(progress, staging)
        source.write_vocabularies(staging)
        counts = {}
        names = {split: [f"{number:06d}.tar" for number in range(count)] for split, count in source.shards.items()}
        for split in names:
            remove_strangers(staging / split, names[split])
            counts[split] = finish(staging / split, args.format, split, names[split])
        if args.out.exists():
            clear(args.out)
        staging.rename(args.out)
        for split in names:
            remove_traces(args.out / split, names[split])
    for split, count in counts.items():
        print(f"{args.out / split}: {count} samples in {source.shards[split]} shards")
    for reason, count in source.omitted.items():
        print(f"left out: {count} records: {reason}")
    if progress.rejects:
        print(f"rejected: {len(progress.rejects)} records without a usable image, see {args.out / REJECTS}")


@contextmanager
def _kept_if_filled(staging: Path) -> Iterator[None]:
    """Leave a folder behind only if there is something in it to go on from."""
    try:
        yield
    finally:
        if staging.exists() and not any(path.is_file() for path in staging.rglob("*")):
            shutil.rmtree(staging)
        Path(f"{staging}.lock").unlink(missing_ok=True)


def _fails(error: Exception) -> Iterator[Any]:
    raise error
    yield


def check_rejects(args: argparse.Namespace, progress: Progress, staging: Path) -> None:
    """End the conversion where too many records have no usable image.

    Raises:
        DataError: it is so; their list is written.
    """
    if len(progress.rejects) > args.max_reject_share * progress.done:
        write_rejects(progress, staging)
        first = progress.rejects[0]
        raise DataError(
            f"--max-reject-share {args.max_reject_share}: {len(progress.rejects)} of {progress.done} records have no "
            f"usable image (such as {first['image']}: {first['reason']}); {staging / REJECTS} lists them; check "
            "--images, mend them, or raise the share, and start the same command again: finished shards are kept"
        )


def write_rejects(progress: Progress, folder: Path) -> None:
    """One JSON object a rejected record, in the source's order of keys."""
    lines = sorted(json.dumps(reject, ensure_ascii=False) for reject in progress.rejects)
    (folder / REJECTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")


def index(args: argparse.Namespace, comm: Any) -> None:
    """Index the tars of a folder where they lie; every rank calls it."""
    folder, progress = args.src.resolve(), Progress("samples")
    paths = sorted(folder.glob("*.tar"))

    def jobs() -> Iterator[Path]:
        if not paths:
            raise DataError(f"--src {args.src}: no .tar files there; an index needs at least one shard")
        yield from paths

    def work(path: Path, between: Any) -> ShardDone:
        return index_tar(path)

    if comm is not None and comm.rank > 0:
        spread(comm, iter(()), work, progress.add)
        return
    lock = FileLock(folder / "index.lock", timeout=0)
    try:
        held = lock.acquire()
    except (Timeout, OSError) as error:
        reason = "another process is indexing it" if isinstance(error, Timeout) else f"cannot be written to ({error})"
        spread(comm, _fails(ConfigError(f"--src {args.src}: {reason}")), work, progress.add)
        return
    names = [path.name for path in paths]
    with held:
        try:
            spread(comm, jobs(), work, progress.add)
            count = finish(folder, folder.parent.name, folder.name, names)
            remove_traces(folder, names)
        finally:
            (folder / "index.lock").unlink(missing_ok=True)
    print(f"{args.src}: {count} samples in {len(paths)} shards")


def verify(args: argparse.Namespace, comm: Any) -> None:
    """Read all shards again; every rank calls it.

    Raises:
        DataError: on rank 0, one differs from its index.
    """
    folder = args.src if args.format == "index" else args.out
    faults: list[str] = []
    num_shards = 0

    def jobs() -> Iterator[tuple[Path, Shard]]:
        nonlocal num_shards
        splits = sorted(path.parent for path in [*folder.glob(INDEX), *folder.glob(f"*/{INDEX}")])
        if not splits:
            raise DataError(f"{folder}: has no {INDEX}; prepare the shards first")
        for split in splits:
            if (fault := members_fault(split)) is not None:
                take(fault)
            for shard in ShardIndex(split, check_files=False).shards:
                num_shards += 1
                yield split, shard

    def take(fault: str | None) -> None:
        if fault:
            log.warning("%s", fault)
            faults.append(fault)

    spread(comm, jobs(), lambda job, between: fault_of(*job), take)
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in sorted(faults))
        raise DataError(
            f"{len(faults)} of {num_shards} shards are not as indexed; copy or prepare them again:\n{listed}"
        )
    if comm is None or comm.rank == 0:
        print(f"{folder}: {num_shards} shards are as indexed")


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Convert, index or verify."""
    args = parse_arguments(argv)
    comm = communicator()
    leads = comm is None or comm.rank == 0
    faults: list[str] = []
    try:
        check(args)
    except ConfigError as error:
        faults = error.faults
    # A node may lack what another has: what one finds ends all.
    if comm is not None:
        faults = list(dict.fromkeys(fault for found in comm.allgather(faults) for fault in found))
    if faults:
        if leads:
            raise ConfigError(faults)
        return
    logging.basicConfig(level=logging.INFO if leads else logging.WARNING, format="%(asctime)s %(message)s")
    task = verify if args.verify else index if args.format == "index" else convert
    try:
        task(args, comm)
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
