"""A public data set -> shards with their index, one folder a split, by all ranks of a job.

    OUT.partial/    what is being written; an interrupted conversion resumes from what is there
    OUT.replaced/   the earlier folder of that name, until it is removed

Source: none.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unimo3.data.answers import AnswerVocabulary
from unimo3.data.formats.record import Converter, Sample
from unimo3.data.formats.vqav2 import answer_vocabulary, normalized_choices
from unimo3.data.index import REJECTS, is_index, is_test_split
from unimo3.data.mpi_jobs import failing, spread
from unimo3.data.progress import PreparationProgress
from unimo3.data.shards import ShardDone, ShardJob, cut, finish, remove_traces, remove_unlisted, write_shard
from unimo3.data.stored_images import ImageOptions
from unimo3.data.tokenizer import train_tokenizer
from unimo3.errors import ConfigError, DataError

# What distinguishes this program's folders from others, which are never removed; in that of a split, what it is.
MARK = ".unimo3-shards"
# What a conversion's folder has besides its splits.
EXTRAS = ("tokenizer", "answers.json", REJECTS, MARK)
MAX_REJECT_RATIO = 0.001


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how.

    Attributes:
        format: the data set's name, one of `formats.CONVERTERS`.
        converter: reads it.
        source: folder of the annotation files.
        images: folder of the images.
        out: folder of the shards.
        overwrite: whether an earlier conversion's `out` is replaced.
        shard_size: records a shard.
        max_reject_ratio: of a split's records that cannot be used, past which it fails. None: `MAX_REJECT_RATIO`,
            and 0 of the splits that are tested on.
        tokenizer_vocab: entries of a tokenizer to train on the training captions. 0: none.
        min_answer_count: least count of an answer of the vocabulary.
        url: where `out` is sent afterwards and removed, as it is printed. Empty: `out` stays.
    """

    format: str
    converter: Converter
    source: Path
    images: Path
    out: Path
    overwrite: bool
    shard_size: int
    options: ImageOptions
    max_reject_ratio: float | None
    tokenizer_vocab: int
    min_answer_count: int
    url: str = ""

    @property
    def destination(self) -> str:
        """Where the shards are in the end."""
        return self.url.rstrip("/") or str(self.out)

    def reject_limit(self, split: str) -> float:
        """The limit of a split. Results on a test split with fewer records are not those of others."""
        if self.max_reject_ratio is not None:
            return self.max_reject_ratio
        return 0.0 if is_test_split(split) else MAX_REJECT_RATIO


_SPLIT_BY_IMAGE = ("coco", "flickr30k")


class Source:
    """The records of a data set, and what is collected while they are read."""

    def __init__(self, wanted: Conversion):
        self._wanted = wanted
        self.captions: list[str] = []
        self.choices: Counter[str] = Counter()
        self.omitted: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()

    def jobs(self) -> Iterator[ShardJob]:
        """All shards to be written.

        Raises:
            DataError: a record is invalid, or there is none.
        """
        for job in cut(self._records(), self._wanted.shard_size):
            self.shards[job.split] += 1
            yield job
        if not self.shards:
            raise DataError(f"--src {self._wanted.source}: has no records of {self._wanted.format}; name one that has")

    def _records(self) -> Iterator[tuple[str, Sample]]:
        wanted, seen = self._wanted, set()
        split_of: dict[str, str] = {}
        for split, sample in wanted.converter(wanted.source, wanted.images, self.omitted):
            if (split, sample.key) in seen:
                raise DataError(
                    f"{sample.images[0]}: '{sample.key}' occurs twice in the source's split {split}; remove one record"
                )
            seen.add((split, sample.key))
            # Their images are split; in the others, an image or a pair may have texts in several splits.
            if wanted.format in _SPLIT_BY_IMAGE and split_of.setdefault(sample.key, split) != split:
                raise DataError(
                    f"{sample.images[0]}: is in the source's splits {split_of[sample.key]} and {split}; held-out "
                    "images must not be trained on: remove one record"
                )
            if "questions" in sample.content:
                self.choices.update(normalized_choices(sample))
            elif split == "train" and wanted.tokenizer_vocab:
                self.captions.extend(sample.content.get("captions", []))
            yield split, sample

    def write_vocabularies(self, folder: Path) -> None:
        """Write the tokenizer and the answers, where they are asked for."""
        wanted = self._wanted
        if wanted.tokenizer_vocab:
            size = train_tokenizer(self.captions, wanted.tokenizer_vocab, folder / "tokenizer")
            print(f"tokenizer: {size} entries from {len(self.captions)} captions")
        if self.choices:
            answers = answer_vocabulary(self.choices, wanted.min_answer_count)
            if not answers:
                (most, count), *_ = self.choices.most_common(1)
                raise DataError(
                    f"--min-answer-count {wanted.min_answer_count}: no answer is given that often (the most frequent, "
                    f"{most!r}, {count} times); lower it"
                )
            AnswerVocabulary(answers).save(folder / "answers.json")
            print(f"answers.json: {len(answers)} answers of {len(self.choices)}")


def convert(wanted: Conversion, comm: Any) -> None:
    """Convert into a staging folder, then rename it; every rank calls it.

    Raises:
        ConfigError: another process is writing there.
        DataError: the source is invalid, or too many of its images are.
    """
    staging, _ = sibling_folders(wanted.out)
    source, progress = Source(wanted), PreparationProgress("records")

    def work(job: ShardJob, between: Any) -> ShardDone:
        return write_shard(job, staging, wanted.options, between)

    if comm is not None and comm.rank > 0:
        spread(comm, iter(()), work, progress.add)
        return
    lock = FileLock(f"{staging}.lock", timeout=0)
    try:
        acquired = lock.acquire()
        staging.mkdir(parents=True, exist_ok=True)
        (staging / MARK).touch()
    except (Timeout, OSError) as error:
        # The others wait for jobs: they are notified through the same channel.
        reason = "another process is writing there" if isinstance(error, Timeout) else f"cannot be made ({error})"
        spread(comm, failing(ConfigError(f"--out {wanted.out}: {reason}")), work, progress.add)
        return
    with acquired, _removed_if_empty(staging):
        spread(comm, source.jobs(), work, progress.add)
        progress.show()
        _check_rejects(wanted, progress, staging)
        _remove_leftovers(staging, source)
        if progress.rejects:
            _write_rejects(progress, staging)
        source.write_vocabularies(staging)
        counts = _index_splits(wanted, source, progress, staging)
        _publish(wanted, staging)
    for split, count in counts.items():
        print(f"{wanted.destination}/{split}: {count} samples in {source.shards[split]} shards")
    for reason, count in source.omitted.items():
        print(f"skipped {count} records: {reason}")
    if progress.rejects:
        print(f"rejected: {len(progress.rejects)} records that cannot be used, see {wanted.destination}/{REJECTS}")


def _remove_leftovers(staging: Path, source: Source) -> None:
    """Remove what an earlier attempt with other arguments has left."""
    for path in staging.iterdir():
        if path.name not in (*source.shards, MARK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _index_splits(wanted: Conversion, source: Source, progress: PreparationProgress, staging: Path) -> dict[str, int]:
    """Write each split's index; the number of its samples."""
    counts = {}
    for split, num_shards in source.shards.items():
        names = [f"{number:06d}.tar" for number in range(num_shards)]
        remove_unlisted(staging / split, names)
        missing = sorted(
            (reject["key"], number, identity)
            for reject in progress.rejects
            if reject["split"] == split
            for number, identity in enumerate(reject["ids"])
        )
        missing_ids = [identity for _, _, identity in missing]
        counts[split] = finish(staging / split, wanted.format, split, names, missing_ids)
        remove_traces(staging / split, names)
        record = {"dataset": wanted.format, "split": split, "missing_ids": missing_ids}
        (staging / split / MARK).write_text(json.dumps(record) + "\n")
    return counts


def _publish(wanted: Conversion, staging: Path) -> None:
    """Give a complete conversion its name, in place of the one that it replaces.

    Raises:
        DataError: another program has made the folder.
    """
    if wanted.out.exists() and not (wanted.overwrite and is_output(wanted.out)):
        raise DataError(
            f"--out {wanted.out}: has been made by another program meanwhile; move it away and start the same "
            f"command again, or rename {staging}, which is complete"
        )
    # Renamed first: the path of a conversion never has a half removed one.
    replaced = sibling_folders(wanted.out)[1]
    remove_output(replaced)
    if wanted.out.exists():
        (wanted.out / MARK).touch()
        wanted.out.rename(replaced)
    staging.rename(wanted.out)
    remove_output(replaced)


def sibling_folders(out: Path) -> tuple[Path, Path]:
    """The folder of an incomplete conversion, and that of the replaced one until it is removed."""
    return out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")


def is_output(folder: Path) -> bool:
    """Whether an earlier run wrote a folder: splits with their index, and this program's other files, nothing else."""
    return folder.is_dir() and all(path.name in EXTRAS or is_index(path) for path in folder.iterdir())


def remove_output(folder: Path) -> None:
    """Remove a conversion's folder, its mark last: after a kill half way it is still recognized as one."""
    if folder.exists():
        for path in folder.iterdir():
            if path.name != MARK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(folder)


@contextmanager
def _removed_if_empty(staging: Path) -> Iterator[None]:
    """Leave a folder behind only if there is something in it to resume from."""
    try:
        yield
    finally:
        if staging.exists() and not any(path.is_file() and path.name != MARK for path in staging.rglob("*")):
            shutil.rmtree(staging)
        Path(f"{staging}.lock").unlink(missing_ok=True)


def _check_rejects(wanted: Conversion, progress: PreparationProgress, staging: Path) -> None:
    """End the conversion where too many records of a split cannot be used.

    Raises:
        DataError: there are too many; their list is written.
    """
    for split, num_records in progress.done_of.items():
        rejects = [reject for reject in progress.rejects if reject["split"] == split]
        limit = wanted.reject_limit(split)
        if len(rejects) > limit * num_records:
            _write_rejects(progress, staging)
            raise DataError(
                f"--max-reject-ratio {limit:g}: {len(rejects)} of {num_records} records of {split} "
                f"cannot be used (such as {rejects[0]['image']}: {rejects[0]['reason']}); "
                f"{staging / REJECTS} lists them; check --images, fix them, or raise the limit, and start the same "
                "command again: finished shards are not removed"
            )


def _write_rejects(progress: PreparationProgress, folder: Path) -> None:
    """One JSON object a rejected record, in the source's order of keys."""
    lines = sorted(json.dumps(reject, ensure_ascii=False) for reject in progress.rejects)
    (folder / REJECTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
