"""What the data sets of `experiments.cross_layer` have in common: their files, and pretraining on their captions.

Source: METER, arXiv 2111.02387 (MLM, ITM); ALBEF, arXiv 2107.07651 (ITC).
"""

import hashlib
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.report import ROOT
from experiments.gate_probe import GateMeans, GateSpreads
from experiments.training import READER, Schedule, num_parameters, on_cpu, train
from experiments.variants import RunSettings
from unimo3.data.index import ShardIndex
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.training.evaluation import Unguarded, held_out_losses

Stage = Literal["pilot", "run"]
CAPTION_TOKENS = 20
MASKED_FRACTION = 0.15


class Outcome(NamedTuple):
    """What one run gives.

    Attributes:
        metrics: of held-out data, by name.
        gates: see `GateRecorder.means`.
        gate_spreads: see `GateRecorder.spreads`.
        forced: the primary metric with forced gates, by `forcings`.
        model: as measured.
        training: of each stage, see `train`.
    """

    metrics: dict[str, float]
    gates: dict[str, GateMeans]
    gate_spreads: GateSpreads
    forced: dict[str, float]
    model: Any
    training: dict[str, dict[str, Any]]

    def to_line(self) -> dict[str, Any]:
        """What the file of results has of it."""
        line = self._asdict()
        return line | {"parameters": num_parameters(line.pop("model"))}


class DataSet(ABC):
    """Data in a work folder, and how a variant is trained and measured on it.

    Attributes:
        name: in the results.
        primary: the one metric that decides.
        title: of the metric, for tables.
    """

    name: ClassVar[str]
    primary: ClassVar[str]
    title: ClassVar[str]
    settings: RunSettings

    @abstractmethod
    def commands(self) -> list[tuple[Path, list[str]]]:
        """The folders of the data, and for each the module and its arguments that make it, complete or not at all."""

    def make(self) -> None:
        """Make the folders that are not there yet.

        Raises:
            SystemExit: a command failed, with its status.
        """
        for folder, command in self.commands():
            if not folder.exists():
                status = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
                if status:
                    sys.exit(status)

    @abstractmethod
    def run(self, variant: str, seed: int, stage: Stage) -> Outcome:
        """Train and measure; the same arguments give the same metrics on one machine."""

    @abstractmethod
    def guess(self) -> float:
        """The primary metric of the best guess without a picture, which a run that diverges counts as."""

    @property
    @abstractmethod
    def captions(self) -> Path:
        """``dataset_coco.json`` of the pictures."""

    @property
    @abstractmethod
    def shards(self) -> Path:
        """Folder of the captioned pictures' shards: train/ val/ test/ tokenizer/."""

    def digest(self) -> str:
        """Of pictures' names, splits and captions: runs of equal data compare."""
        return hashlib.sha256(self.captions.read_bytes()).hexdigest()[:12]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Trained on the training captions."""
        return load_tokenizer(str(self.shards / "tokenizer"))

    def pairs(
        self, split: str, seed: int, transform: ImageTransform, masked: float = MASKED_FRACTION
    ) -> PretrainSamples:
        """Captioned pictures of a split."""
        index = ShardIndex(self.shards / split)
        return PretrainSamples(index, self.tokenizer(), CAPTION_TOKENS, transform, masked, seed)

    def pretrain(
        self, variant: str, seed: int, transform: ImageTransform
    ) -> tuple[Any, dict[str, float], dict[str, Any]]:
        """A pretrained model, its held-out metrics, and how the training went.

        Args:
            transform: of the training pictures.
        """
        settings = self.settings
        contestant = settings.contestant(variant)
        task = contestant.build_pretraining(self.tokenizer(), seed)
        schedule = Schedule(
            f"{self.name} {variant} seed {seed}: pretraining",
            settings.pretraining_steps,
            settings.batch,
            settings.pretraining_lr,
            seed,
        )
        training = train(task, self.pairs("train", seed, transform), schedule, contestant.optimizer)
        held_out = self.pairs("val", seed, ImageTransform(settings.image_size))
        losses = held_out_losses(on_cpu(task), held_out, World(0, 0, 1), settings.batch, READER, Unguarded())
        assert losses is not None
        return task.model, {name: value for name, value in losses.items() if not name.startswith("gates_")}, training
