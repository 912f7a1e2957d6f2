"""A run's folder: its settings, model files, metrics, checkpoints and ledger, and how it is resumed.

RUN/config.yaml          the resolved settings of the first start; each checkpoint's state.json has its own
RUN/model/               config.json, tokenizer and image processor, copied next to exported weights
RUN/checkpoints/         see unimo3/checkpoint/store.py
RUN/best.json            in fine-tuning, the best checkpoint on held-out data
RUN/metrics.jsonl        one object a step
RUN/tensorboard/         the same as events
RUN/ledger/              on request: which samples each rank read at each step
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from unimo3 import config
from unimo3.atomic_write import naming
from unimo3.checkpoint import store
from unimo3.checkpoint.load import choose, load, quarantine
from unimo3.checkpoint.state import TrainState
from unimo3.data.order import batch_of_step, batches_read
from unimo3.data.source_changes import source_changes
from unimo3.data.tokenizer import load_tokenizer
from unimo3.distributed import broadcast_object, world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError, ConfigError, DataError
from unimo3.training.metrics import MetricsWriter, drop_after

log = logging.getLogger(__name__)

# Settings that may change when a run is resumed: they alter how it runs, not what it computes. Data of
# data.train is checked by its fingerprint, data.skip by what was read; a ds_config must keep the stage and precision of
# the checkpoint. With another number of ranks another training.micro_batch keeps the pairs of a micro-step; a change of
# them is logged.
FREE_SETTINGS = (
    "run.dir",
    "checkpoint.",
    "kernels.",
    "optim.fused",
    "training.stop_after",
    "training.eval_every",
    "training.log_every",
    "training.gate_heads",
    "training.ds_config",
    "training.nvme_path",
    "training.micro_batch",
    "training.stall_after_s",
    "training.activation_checkpointing",
    "training.max_skipped",
    "data.train",
    "data.val",
    "data.skip",
    "data.num_workers",
    "data.prefetch",
    "data.cache_dir",
    "data.cache_gb",
    "data.ledger",
    "data.max_bad_ratio",
    "best.",
    "eval_only",
    "ranking.",
)

# Settings of data that decide what an evaluation alone computes.
_READ_BY_EVALUATION = ("data.max_text_tokens", "data.tokenizer")

# What versions without a setting did, where its default is another one.
_BEFORE_THE_SETTING = {"data.reduced_decode": False}

# Gate maps of the training in TensorBoard at most; each has some 25 kB.
_NUM_MAPS = 200

# Folders in a run's folder.
_FOLDERS = ("checkpoints", "heartbeats", "ledger", "model", "tensorboard")

# Initial weights are not needed once there is a checkpoint; they may have been moved or removed.
_FIRST_WEIGHTS = ("init", "model.init", "model.text.init", "model.vision.init")


def changed_settings(settings: Any) -> list[str]:
    """Return which settings are not those the run was started with, one line per error; none for a new run.

    Args:
        settings: a program's complete configuration; its ``run`` group names the folder.
    """
    path: Path = settings.run.folder / "config.yaml"
    return _differences(config.read_flat(path, type(settings)), settings) if path.exists() else []


def _differences(before: dict[str, Any], settings: Any) -> list[str]:
    # A setting the run's version did not know had the default's effect, with few exceptions.
    defaults = config.flatten(type(settings)()) | _BEFORE_THE_SETTING
    return [
        f"{key}: {now!r}: this run was started with {before.get(key, defaults[key])!r}; keep that, or choose a new "
        "run.name"
        for key, now in config.flatten(settings).items()
        if before.get(key, defaults[key]) != now and not _may_change(key, now, settings)
    ]


def _may_change(key: str, now: Any, settings: Any) -> bool:
    run: Path = settings.run.folder
    is_of_training = key.startswith(("training.", "optim.", "data.")) and key not in _READ_BY_EVALUATION
    if is_of_training and getattr(settings, "eval_only", False):
        return True
    if key in _FIRST_WEIGHTS:
        return bool(store.list_checkpoints(run))
    if key == "data.tokenizer":  # the same one elsewhere, as after a move to another cluster
        try:
            return load_tokenizer(now).get_vocab() == load_tokenizer(str(run / "model")).get_vocab()
        except ConfigError:
            return False
    return key.startswith(FREE_SETTINGS)


@dataclass(frozen=True)
class RunArgs:
    """The run's name, folder and seed."""

    name: str = "run"
    """Name of the run, and of its folder."""
    dir: str = "runs"
    """Parent folder of runs, on storage that all nodes share."""
    seed: int = 0
    """Seed of initial weights, sample order, masks, augmentation, negatives and dropout."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir) / self.name

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        errors = []
        if not self.name or Path(self.name).name != self.name or self.name in (".", ".."):
            errors.append(f"run.name: '{self.name}': a plain folder name is needed, without '/'")
        if self.seed < 0:
            errors.append(f"run.seed: {self.seed}: 0 or more is needed")
        if not self.dir:
            errors.append("run.dir: '': a folder is needed")
        return errors or [
            f"run.dir: '{path}': is {_kind_of(path)}, no folder; mount it, remove it, or choose another run.dir"
            for path in (Path(self.dir), self.folder, *(self.folder / name for name in _FOLDERS))
            if os.path.lexists(path) and not path.is_dir()
        ]


def _kind_of(path: Path) -> str:
    return f"a link to {path.readlink()}, which is missing" if not path.exists() else "a file"


class Saveable(Protocol):
    """What writes itself into a folder, as transformers' classes do."""

    def save_pretrained(self, save_directory: Path) -> Any:
        """Write into a folder."""
        ...


class Run:
    """One run, new or resumed.

    Args:
        settings: the program's complete configuration, without `changed_settings`; its ``run`` group names the folder.
        global_batch: pairs an optimizer step.
        fingerprint: of the training data's index. None: this process trains on none, whatever the run was trained on.
        data: facts on each source of the training data, for the record.
        init_data: the same of the run whose weights a new run starts from. None: it starts from no weights of the
            complete model. Empty: they have no such record.
    """

    def __init__(
        self,
        settings: Any,
        global_batch: int,
        fingerprint: str | None,
        data: Sequence[dict[str, Any]] = (),
        init_data: Sequence[dict[str, Any]] | None = None,
    ):
        self.folder: Path = settings.run.folder
        self.step = 0
        self.num_bad_samples = 0
        self.num_skipped = 0
        self.metrics: MetricsWriter
        self._settings = settings
        self._global_batch = global_batch
        self._fingerprint = fingerprint
        self._data = list(data)
        self._init_data = init_data
        self._ledger: TextIO | None = None
        self._keeps_ledger: bool = settings.data.ledger
        self._skipped: list[list[int]] = settings.data.skip
        self._rank, self._world_size = world()
        if self._rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "config.yaml").exists():
                config.save(settings, self.folder / "config.yaml")

    def write_model_files(self, *parts: Saveable) -> None:
        """Save what an exported folder needs next to the weights: configuration, tokenizer, image processor."""
        final, staging = self.folder / "model", self.folder / "model.tmp"
        # A start before the first checkpoint begins again, perhaps from other weights or with other answers.
        if self._rank != 0 or (final.exists() and store.has_folders(self.folder)):
            return
        with naming(staging):
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir()
            for part in parts:
                part.save_pretrained(staging)
            if final.exists():
                shutil.rmtree(final)
            staging.rename(final)

    def resume(self, engine: Engine) -> None:
        """Load the newest good checkpoint, if there is one, and continue the metrics from there.

        Raises:
            CheckpointError: there are checkpoints but no good one; or the newest good one was made from other data,
                with other settings.
        """
        if self._rank == 0 and self._fingerprint is not None:
            store.restore_replaced(self.folder)
        newest, damaged = choose(self.folder)
        if newest is None and broadcast_object(self._rank == 0 and store.has_folders(self.folder)):
            raise CheckpointError(
                f"{store.folder_of(self.folder)}: none of the checkpoints is good, see the log; copy a good one "
                "back, or move them all away to train from the beginning"
            )
        if newest is not None:
            state = load(engine, newest)
            if self._fingerprint is not None and state.index_fingerprint != self._fingerprint:
                raise CheckpointError(
                    f"{newest}: was trained on shards with fingerprint {state.index_fingerprint[:12]}, data.train now "
                    f"has {self._fingerprint[:12]}; point data.train to the same shards or choose a new run.name"
                )
            before = config.renamed(state.extra["settings"])
            errors = _differences(before, self._settings)
            if self._fingerprint is not None:
                errors += self._skip_errors(state.step, before.get("data.skip", []))
            if errors:
                raise ConfigError(errors)
            self.step, self.num_bad_samples = state.step, state.extra["bad_samples"]
            self.num_skipped = state.extra.get("skipped_steps", 0)
            self._init_data = state.extra.get("init_data")
            if self._fingerprint is not None:
                quarantine(damaged)
            if self._rank == 0:
                log.info("resumed from %s at step %d%s", newest, self.step, self._change_of_ranks(state))
        elif self._init_data is not None and self._rank == 0:
            self._log_sources(self._init_data)
        if self._skipped and self._fingerprint is not None and self._rank == 0:
            batch = batch_of_step(self.step, self._skipped)
            log.info("data.skip: %s: step %d reads the data of step %d", self._skipped, self.step + 1, batch + 1)
        # A process that does not train drops no record of the training.
        resumed_step = None if self._fingerprint is None else self.step
        training = self._settings.training
        map_every = max(1, training.steps // _NUM_MAPS)
        self.metrics = MetricsWriter(self.folder, resumed_step, self._rank == 0, training.gate_heads, map_every)
        if self._keeps_ledger and self._fingerprint is not None:
            folder = self.folder / "ledger"
            folder.mkdir(parents=True, exist_ok=True)
            ledger_path = folder / f"rank_{self._rank:05d}.jsonl"
            # Also those of ranks that no longer exist: other ranks read their samples after the checkpoint again.
            for path in sorted({ledger_path, *folder.glob("rank_*.jsonl")}):
                if int(path.stem.removeprefix("rank_")) % self._world_size == self._rank:
                    drop_after(path, self.step)
            self._ledger = ledger_path.open("a", buffering=1)

    def _log_sources(self, before: Sequence[dict[str, Any]]) -> None:
        """Log how the data sources differ from those of the weights that the run starts from."""
        changes = source_changes(before, self._data)
        difference = f"are not those of its weights: {'; '.join(changes)}" if changes else "are those of its weights"
        log.info("the data sources of this run %s", difference if before else "are new: its weights record none")

    def _skip_errors(self, num_steps: int, before: list[list[int]]) -> list[str]:
        """Return an error if other data would have been read by now.

        Args:
            num_steps: steps done.
            before: ``data.skip`` of these steps.
        """
        read = batches_read(num_steps, before)
        if read == batches_read(num_steps, self._skipped):
            return []
        return [
            f"data.skip: {self._skipped}: changes what was read up to step {num_steps}, with {before}; only ranges "
            f"from {read[-1][1]} on can change. To skip data that was read, move the checkpoints after its first step "
            f"out of {store.folder_of(self.folder)}, so that the run resumes before it"
        ]

    def data_metrics(self) -> dict[str, Any]:
        """Of a run that skips data, ``data_step``: the step that would read this step's data if it skipped none."""
        return {"data_step": batch_of_step(self.step - 1, self._skipped) + 1} if self._skipped else {}

    def _change_of_ranks(self, state: TrainState) -> str:
        """What another number of ranks changes, as the end of a log line."""
        before = state.extra["settings"]["training.micro_batch"] * state.world_size
        now = self._settings.training.micro_batch * self._world_size
        if before != now and self._fingerprint is not None:
            log.warning(
                "a micro-step now has %d pairs over all ranks, previously %d, which changes the ITM loss, and the ITC "
                "loss unless objectives.itc.over is step: set training.micro_batch to %g with %d ranks to restore it",
                now,
                before,
                before / self._world_size,
                self._world_size,
            )
        return "" if state.world_size == self._world_size else f", from {state.world_size} ranks to {self._world_size}"

    def state(self) -> TrainState:
        """The run's state, as a checkpoint of the current step saves it."""
        assert self._fingerprint is not None, "what does not train saves nothing"
        settings = config.flatten(self._settings)
        return TrainState(
            step=self.step,
            samples_consumed=self.step * self._global_batch,
            config_hash=config.fingerprint(settings),
            index_fingerprint=self._fingerprint,
            world_size=self._world_size,
            global_batch=self._global_batch,
            extra={
                "settings": settings,
                "data": self._data,
                "init_data": self._init_data,
                "bad_samples": self.num_bad_samples,
                "skipped_steps": self.num_skipped,
            },
        )

    def count_bad_samples(self, number: int) -> None:
        """Count what all ranks replaced at this step.

        Raises:
            DataError: on every rank; it is more than ``data.max_bad_ratio`` of all samples read.
        """
        self.num_bad_samples += number
        limit, num_read = self._settings.data.max_bad_ratio, self.step * self._global_batch
        # A single bad sample among the first is no estimate of their ratio.
        if self.num_bad_samples > max(limit * num_read, 1 if limit else 0):
            raise DataError(
                f"{self._settings.data.train}: {self.num_bad_samples} of {num_read} samples could not be used, more "
                f"than data.max_bad_ratio {limit}; the log names them; prepare the shards again or raise it"
            )

    def record_samples(self, micro_batches: Iterable[dict[str, Any]]) -> None:
        """With ``data.ledger``, note which samples this rank read at this step: source, shard, number there, key."""
        if self._ledger is not None:
            samples = [sample for batch in micro_batches for sample in batch["samples"]]
            try:
                self._ledger.write(json.dumps({"step": self.step, "samples": samples}) + "\n")
            except OSError as error:  # the file keeps it in memory and tries again
                log.warning("the ledger of step %d cannot be written yet (%s)", self.step, error)

    def record_saves(self, saves: Iterable[tuple[int, float]]) -> None:
        """Write how long committed saves took; what a grace period has to allow for."""
        for step, seconds in saves:
            self.metrics.write({"step": step, "save_s": seconds}, group="save")
            if self._rank == 0:
                log.info("step %d saved in %.1f s", step, seconds)

    def close(self) -> None:
        """Close the metrics' files."""
        self.metrics.close()
        with suppress(OSError):  # reported before
            if self._ledger is not None:
                self._ledger.close()
