"""Settings of the data."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unimo3.config import Checked
from unimo3.data.cache import ShardCache
from unimo3.data.index import ITEM_KINDS, MAX_OPEN_SHARDS, ShardIndex, is_test_split
from unimo3.data.order import MixedOrder, batch_of_step, training_order
from unimo3.data.sample_texts import answers_of, texts_of
from unimo3.data.shard_checks import index_errors
from unimo3.data.tokenizer import folder_errors, load_tokenizer
from unimo3.errors import ConfigError, DataError, no_answer
from unimo3.limits import process_limit_errors, shared_memory_errors
from unimo3.object_store import is_store
from unimo3.texts import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unimo3.data.loader import TrainingLoader
    from unimo3.data.samples import Samples

Augment = Literal["none", "randaugment"]
# Measured and rounded up.
_FILES_OF_RANK, _FILES_OF_SOURCE, _FILES_OF_READER, _FILES_OF_PEER = 80, MAX_OPEN_SHARDS + 3, 5, 3
_THREADS_OF_RANK, _THREADS_OF_READER = 20, 3
# Of each process that reads from an object store.
_FILES_OF_STORE, _THREADS_OF_STORE = 8, 3


@dataclass(frozen=True)
class ReaderArgs:
    """How many processes read, and how far ahead."""

    num_workers: int
    prefetch: int


@dataclass(frozen=True)
class DataArgs(Checked):
    """Shards, tokenizer, and how samples are read."""

    train: dict[str, float] | str = ""
    """Folder of training shards with their index.json, or its URL, https: or in an object store such as s3:; or several
    with their weights in the mixture, such as {shards/coco/train: 1, shards/vg/train: 2}."""
    mix_temperature: float = 0.0
    """T above 0: a source's weight is multiplied by its number of samples to the power 1/T. 1: in proportion to sizes;
    larger values favor small sources. 0: the weights of data.train alone."""
    max_epochs: int = 0
    """Epochs of a source after which it leaves the mixture; the others continue with their weights. 0: no limit."""
    skip: list[list[int]] = field(default_factory=list)
    """Ranges [a, b] of steps whose data no step reads: [[100, 110]] skips the data that steps 101 to 110 read without
    it. Ranges ascend. In a resumed run, only data that was not read yet can be added or removed."""
    val: str | None = None
    """Folder of held-out shards, for evaluation, or its URL. Null: none."""
    tokenizer: str = ""
    """Tokenizer folder: RoBERTa's, or one that prepare_shards trained."""
    max_text_tokens: int = 50
    """Tokens a text is cut or padded to, <s> and </s> included."""
    augment: Augment = "none"
    """Augmentation of training images: none, or RandAugment without mirroring."""
    crop_scale: float = 1.0
    """Least fraction of a training image's area that a random crop keeps; 1 crops nothing, since texts speak of all."""
    reduced_decode: bool = True
    """Whether a training JPEG with at least four times the height and width that are needed is decoded at 1/2, 1/4 or
    1/8 of its size, never below twice what is needed. Held-out images are always decoded in full."""
    window_shards: int = 16
    """Shards of a source whose samples are shuffled together."""
    cache_dir: str = ""
    """Folder on a node's own disk for copies of shards; needed for URLs, useful for slow mounted stores.
    Empty: shards are read where they are."""
    cache_gb: float = 100.0
    """Limit of the copies' total size, in 10^9 bytes; the least recently used are removed first."""
    num_workers: int = 4
    """Reader processes of each rank; 0 reads in the training process."""
    prefetch: int = 4
    """Micro-batches each reader prepares ahead."""
    max_bad_ratio: float = 0.001
    """Fraction of unreadable samples of all read so far past which the run exits with status 78; up to it they are
    replaced and counted. A single one is tolerated however few were read, unless this is 0."""
    ledger: bool = False
    """Whether to write which samples each step and rank read into the run's folder."""

    @property
    def reader(self) -> ReaderArgs:
        """How samples are read ahead."""
        return ReaderArgs(self.num_workers, self.prefetch)

    @property
    def sources(self) -> dict[str, float]:
        """Training shards and their weights in the mixture."""
        return self.train if isinstance(self.train, dict) else {self.train: 1.0}

    def open_train(self) -> list[ShardIndex]:
        """The sources' indexes.

        Raises:
            DataError: one cannot be used.
        """
        return [self._open(source) for source in self.sources]

    def open_val(self) -> ShardIndex | None:
        """The index of the held-out shards, if there are any.

        Raises:
            DataError: it cannot be used.
        """
        return None if self.val is None else self._open(self.val)

    def fingerprint(self, indexes: list[ShardIndex]) -> str:
        """What decides the stream besides the seed: the sources' shards, their weights and the limit of epochs."""
        if len(indexes) == 1:
            return indexes[0].fingerprint
        weights = [str(weight) for weight in self.weights(indexes)]
        mixture: list[Any] = list(zip((index.fingerprint for index in indexes), weights, strict=True))
        mixture += [self.max_epochs] if self.max_epochs else []
        return hashlib.sha256(json.dumps(mixture).encode()).hexdigest()

    def weights(self, indexes: list[ShardIndex]) -> list[float]:
        """The weight of each source in the mixture."""
        if not self.mix_temperature:
            return list(self.sources.values())
        # Few digits: the power's last one may differ from machine to machine.
        return [
            float(f"{weight * index.num_samples ** (1 / self.mix_temperature):.12g}")
            for index, weight in zip(indexes, self.sources.values(), strict=True)
        ]

    def facts(self, indexes: list[ShardIndex]) -> list[dict[str, Any]]:
        """What is recorded of each source in checkpoints: its name, size, weight in the mixture and fingerprint."""
        return [
            {
                "dataset": index.dataset,
                "split": index.split,
                "samples": index.num_samples,
                "weight": weight,
                "fingerprint": index.fingerprint,
            }
            for index, weight in zip(indexes, self.weights(indexes), strict=True)
        ]

    def training_loader(
        self,
        sources: "Sequence[Samples]",
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int,
    ) -> "TrainingLoader":
        """The run's stream from `start_step` on, one rank's part of it; see `TrainingLoader`.

        Args:
            sources: one for each of `open_train`.
            seed: of the run.
        """
        from unimo3.data.loader import TrainingLoader

        units = [samples.units_per_shard for samples in sources]
        weights = self.weights([samples.index for samples in sources])
        order = training_order(units, weights, seed, self.window_shards, self.max_epochs)
        return TrainingLoader(
            sources, order, global_batch, micro_batch, rank, world_size, self.reader, start_step, self.skip
        )

    def stream_length(self, num_steps: int, global_batch: int) -> int:
        """Position in the sample order at which a run of so many steps ends."""
        return num_steps and (batch_of_step(num_steps - 1, [] if self._skip_errors() else self.skip) + 1) * global_batch

    def shard_errors(self, kind: str, num_samples: int = 0, trains: bool = True) -> list[str]:
        """Errors of the shards for a program whose samples need `kind`, one line each.

        Args:
            num_samples: position in the sample order at which the complete run ends.
            trains: whether it reads the training shards.
        """
        errors: list[str] = []
        indexes: list[ShardIndex] = []
        if not 0 < self.cache_gb < math.inf:
            return errors  # `validate` reports it
        for name, sources in (("data.train", list(self.sources) if trains else []), ("data.val", [self.val])):
            for source in sources:
                if source is not None and source.startswith("{"):
                    errors.append(
                        f"{name}: '{source}': a mixture is {{FOLDER: WEIGHT, ...}}, with a space after each colon"
                    )
                elif source == "":
                    errors.append(f"{name}: '': no folder is named; make shards with python -m pretrain.prepare_shards")
                elif source is not None:
                    try:
                        index = self._open(source)
                    except DataError as error:
                        if no_answer(error):
                            raise  # no setting is wrong
                        errors.append(f"{name}: '{source}': {error}")
                    else:
                        errors += index_errors(name, index, kind)
                        indexes += [index] if name == "data.train" else []
                        if name == "data.train" and is_test_split(index.split):
                            errors.append(
                                f"{name}: '{source}': is the split {index.split} of {index.dataset}, which is "
                                "for evaluation only; name its train split"
                            )
        return errors or self._length_errors(indexes, kind, num_samples)

    def _length_errors(self, indexes: list[ShardIndex], kind: str, num_samples: int) -> list[str]:
        """Return that the sources end before the run, if they do."""
        if not self.max_epochs or not indexes:
            return []
        units = [index.items_per_shard(kind) if kind in ITEM_KINDS else index.samples_per_shard for index in indexes]
        order = training_order(units, self.weights(indexes), 0, self.window_shards, self.max_epochs)
        length = order.num_units * (1 if isinstance(order, MixedOrder) else self.max_epochs)
        if length >= num_samples:
            return []
        skipped = ", and data.skip" if self.skip else ""
        return [
            f"data.max_epochs: {self.max_epochs}: the run reads {num_samples} samples (training.steps times "
            f"training.global_batch{skipped}), and the sources end after {length:.0f}; lower training.steps or raise it"
        ]

    def text_errors(self, tokenizer: "PreTrainedTokenizerBase", kind: str, trains: bool = True) -> list[str]:
        """Return where the tokenizer knows nothing of the texts of a `kind`, one line per error.

        Args:
            trains: whether the training shards are read.
        """
        errors = []
        for name, source in [("train", source) for source in self.sources if trains] + [("val", self.val)]:
            try:
                samples = self._probes(source) if source else []
            except DataError:
                continue  # `shard_errors` reports it
            texts = [plain(text) for members in samples for text in texts_of(kind, members)]
            special = set(tokenizer.all_special_ids)
            if texts and all(special.issuperset(ids) for ids in tokenizer(texts)["input_ids"]):
                errors.append(
                    f"data.tokenizer: '{self.tokenizer}': knows no part of the {len(texts)} {kind} that were read from "
                    f"data.{name}, such as {texts[0][:40]!r}; use a tokenizer of their language, or a byte-level one"
                )
        return errors

    def probed_answers(self, source: str) -> list[list[str]]:
        """The human answers to some of a source's questions.

        Raises:
            DataError: it cannot be read.
        """
        return [answers for members in self._probes(source) for answers in answers_of(members)]

    def _probes(self, source: str) -> list[dict[str, bytes]]:
        with closing(self._open(source)) as index:
            return [index.read(unit.shard, unit.unit, ("json", "txt")) for unit in index.probes()]

    def check_limits(self, micro_batch: int, image_size: int, num_images: int, trains: bool = True) -> None:
        """Refuse limits of this host that reading would meet later.

        Args:
            image_size: height and width in pixels.
            num_images: of a row.

        Raises:
            ConfigError: shared memory, or the number of open files or of processes, is too small for the readers.
        """
        import torch

        num_local, num_ranks = (int(os.environ.get(f"{of}WORLD_SIZE", "1")) for of in ("LOCAL_", ""))
        # Those of training keep what they have read ahead while others read for an evaluation.
        num_readers = self.num_workers * (trains + (self.val is not None))
        batch_bytes = micro_batch * num_images * 3 * image_size**2
        num_sources = trains * len(self.sources) + (self.val is not None)
        has_store = any(is_store(source) for source in (*self.sources, self.val or ""))
        errors = shared_memory_errors(num_local * num_readers * self.prefetch * batch_bytes)
        errors += process_limit_errors(
            _FILES_OF_RANK
            + _FILES_OF_SOURCE * num_sources
            + num_readers * (_FILES_OF_READER + self.prefetch)
            + _FILES_OF_PEER * num_ranks
            + _FILES_OF_STORE * has_store,
            num_local
            * (_THREADS_OF_RANK + _THREADS_OF_READER * num_readers + _THREADS_OF_STORE * has_store * (1 + num_readers)),
            torch.cuda.is_available(),
        )
        if errors:
            raise ConfigError(errors)

    def _open(self, source: str) -> ShardIndex:
        cache = ShardCache(source, Path(self.cache_dir), int(self.cache_gb * 1e9)) if self.cache_dir else None
        return ShardIndex(source, cache)

    def slow_errors(self) -> list[str]:
        """Return why the tokenizer cannot be used, one line per error."""
        try:
            num_special = load_tokenizer(self.tokenizer).num_special_tokens_to_add()
        except ConfigError as error:
            return error.errors
        if self.max_text_tokens > num_special:
            return []
        return [
            f"data.max_text_tokens: {self.max_text_tokens}: data.tokenizer puts {num_special} special tokens around a "
            f"text; at least {num_special + 1} are needed"
        ]

    def quick_errors(self) -> list[str]:
        """Return the other errors of these settings, one line per error; `shard_errors` checks the shards."""
        errors = folder_errors(self.tokenizer)
        if self.max_text_tokens < 3:
            errors.append(
                f"data.max_text_tokens: {self.max_text_tokens}: at least 3 are needed, for <s>, a word and </s>"
            )
        for name, least in (("window_shards", 1), ("num_workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                errors.append(f"data.{name}: {getattr(self, name)}: at least {least} is needed")
        if not 0 <= self.max_bad_ratio < 1:
            errors.append(f"data.max_bad_ratio: {self.max_bad_ratio}: at least 0 and below 1 is needed")
        if not 0 < self.crop_scale <= 1:
            errors.append(f"data.crop_scale: {self.crop_scale}: above 0 and at most 1 is needed")
        if not 0 < self.cache_gb < math.inf:
            errors.append(f"data.cache_gb: {self.cache_gb}: a number above 0 is needed")
        if not self.sources:
            errors.append("data.train: {}: names no source")
        if not 0 <= self.mix_temperature < math.inf:
            errors.append(f"data.mix_temperature: {self.mix_temperature}: 0 or a number above 0 is needed")
        if self.max_epochs < 0:
            errors.append(f"data.max_epochs: {self.max_epochs}: 0 or more is needed")
        for source, weight in self.sources.items():
            if not 0 < weight < math.inf:
                errors.append(f"data.train: '{source}' has weight {weight}: a number above 0 is needed")
        return errors + self._skip_errors()

    def _skip_errors(self) -> list[str]:
        errors = [
            f"data.skip: {entry}: two steps [a, b] are needed, a at least 0 and below b"
            for entry in self.skip
            if len(entry) != 2 or not 0 <= entry[0] < entry[1]
        ]
        return errors or [
            f"data.skip: {later}: begins before the end of {earlier}; list ranges in ascending order, without overlap"
            for earlier, later in itertools.pairwise(self.skip)
            if later[0] < earlier[1]
        ]
