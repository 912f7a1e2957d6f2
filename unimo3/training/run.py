"""A run's folder: its settings, model files, figures, checkpoints and ledger, and how it is taken up again.

RUN/config.yaml          the resolved settings
RUN/model/               config.json, tokenizer and image processor, copied beside exported weights
RUN/checkpoints/         see unimo3/checkpoint/store.py
RUN/metrics.jsonl        one object a step
RUN/tensorboard/         the same as events
RUN/ledger/              on request: which samples each rank read at each step
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from unimo3 import config
from unimo3.checkpoint import store
from unimo3.checkpoint.state import TrainState
from unimo3.distributed import barrier, world
from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.config import Unimo3Config
from unimo3.training.metrics import MetricsWriter, drop_after

log = logging.getLogger(__name__)

# Settings that may change when a run is taken up again: they alter how it runs, not what it computes.
FREE_SETTINGS = (
    "run.dir", "checkpoint.", "training.stop_after", "training.eval_every", "training.log_every", "training.ds_config",
    "data.val", "data.num_workers", "data.prefetch", "data.ledger", "data.max_bad_share",
)  # fmt: skip


@dataclass(frozen=True)
class RunArgs:
    """The run's name, place and seed."""

    name: str = "run"
    """Name of the run, and of its folder."""
    dir: str = "runs"
    """Folder that holds runs; on storage all nodes share."""
    seed: int = 0
    """Seed of initial weights, sample order, masks, augmentation, negatives and dropout."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir) / self.name

    def faults(self) -> list[str]:
        """Say what is wrong with these settings, one line a fault."""
        found = []
        if not self.name or Path(self.name).name != self.name or self.name in (".", ".."):
            found.append(f"run.name: '{self.name}': a plain folder name is needed, without '/'")
        if self.seed < 0:
            found.append(f"run.seed: {self.seed}: 0 or more is needed")
        return found


class Run:
    """One run, new or taken up again.

    Args:
        settings: the program's whole configuration; its ``run`` group names the folder.
        global_batch: pairs an optimizer step.
        fingerprint: of the training data's index.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """

    def __init__(self, settings: Any, global_batch: int, fingerprint: str):
        self.folder: Path = settings.run.folder
        self.step = 0
        self.metrics: MetricsWriter
        self._settings = settings
        self._global_batch = global_batch
        self._fingerprint = fingerprint
        self._ledger: TextIO | None = None
        self._keeps_ledger: bool = settings.data.ledger
        self._rank, self._world_size = world()
        faults = self._differences()
        if faults:
            raise ConfigError(faults)
        barrier()  # no rank may write the settings before all have compared theirs
        if self._rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            config.save(settings, self.folder / "config.yaml")

    def write_model_files(
        self, model: Unimo3Config, tokenizer: PreTrainedTokenizerBase, processor: BaseImageProcessor
    ) -> None:
        """Keep what an exported folder needs beside the weights."""
        if self._rank == 0:
            for part in (model, tokenizer, processor):
                part.save_pretrained(self.folder / "model")

    def resume(self, engine: Any) -> None:
        """Load the newest good checkpoint, if there is one, and continue the figures from there.

        Raises:
            CheckpointError: it was made from other data or with another number of ranks.
        """
        newest = store.newest_good(self.folder)
        if newest is not None:
            state = store.load(engine, newest)
            if state.index_fingerprint != self._fingerprint:
                raise CheckpointError(
                    f"{newest}: was trained on shards with fingerprint {state.index_fingerprint[:12]}, data.train now "
                    f"has {self._fingerprint[:12]}; point data.train to the same shards or choose a new run.name"
                )
            self.step = state.step
            if self._rank == 0:
                log.info("resumed from %s at step %d", newest, self.step)
        self.metrics = MetricsWriter(self.folder, self.step, enabled=self._rank == 0)
        if self._keeps_ledger:
            folder = self.folder / "ledger"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank_{self._rank:05d}.jsonl"
            drop_after(path, self.step)
            self._ledger = path.open("a", buffering=1)

    def save(self, engine: Any) -> Path:
        """Save and commit a checkpoint of the current step; collective."""
        state = TrainState(
            step=self.step,
            samples_consumed=self.step * self._global_batch,
            config_hash=config.fingerprint(self._settings),
            index_fingerprint=self._fingerprint,
            world_size=self._world_size,
            global_batch=self._global_batch,
        )
        return store.save(engine, self.folder, state)

    def record_keys(self, micro_batches: Iterable[dict[str, Any]]) -> None:
        """With ``data.ledger``, note which samples this rank read at this step."""
        if self._ledger is not None:
            keys = [key for batch in micro_batches for key in batch["keys"]]
            self._ledger.write(json.dumps({"step": self.step, "keys": keys}) + "\n")

    def close(self) -> None:
        """Close the figures' files."""
        self.metrics.close()
        if self._ledger is not None:
            self._ledger.close()

    def _differences(self) -> list[str]:
        path = self.folder / "config.yaml"
        if not path.exists():
            return []
        before, now = config.read_flat(path), config.flatten(self._settings)
        return [
            f"{key}: {now[key]!r}: this run was started with {before[key]!r}; keep that, or choose a new run.name"
            for key in now
            if key in before and before[key] != now[key] and not key.startswith(FREE_SETTINGS)
        ]
