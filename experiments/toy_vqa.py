"""Toy scenes: pretraining on their captions, then VQA, whose questions have three granularities.

Source: METER, arXiv 2111.02387, for fine-tuning and its metric.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.data_sets import DataSet, Outcome, Stage
from experiments.gate_probe import GateRecorder, forced, forcings
from experiments.training import READER, Schedule, on_cpu, train
from experiments.variants import RunSettings
from finetune.task import score_batch
from finetune.vqa import Vqa
from pretrain.toy import blind_rates
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.data.loader import evaluation_batches
from unimo3.data.samples import VqaSamples
from unimo3.data.transforms import ImageTransform
from unimo3.metrics.groups import accuracy_by_group
from unimo3.objectives.vqa import VqaLoss

QUESTION_TOKENS = 24


@dataclass(frozen=True)
class ToyVqaSettings(RunSettings):
    """Of the runs on toy VQA."""

    images: int = 8000
    """Toy images, training and held-out ones."""
    tuning_steps: int = 350
    """Optimizer steps of fine-tuning."""
    tuning_lr: float = 5e-4
    """Peak learning rate of fine-tuning."""


class ToyVqa(DataSet):
    """Toy shards in a folder; the questions about ``val`` and ``test`` pictures are held out."""

    name = "toy_vqa"
    primary = "vqa_overall"
    title = "toy VQA accuracy"

    def __init__(self, work: Path, settings: ToyVqaSettings):
        self.settings: ToyVqaSettings = settings
        size = f"{settings.images}_{settings.image_size}_{settings.vocabulary}"
        self._folder = work.resolve() / f"toy_{size}"
        self._drawn = self._folder / "drawn"

    @property
    def captions(self) -> Path:
        """See `DataSet`."""
        return self._drawn / "coco" / "dataset_coco.json"

    @property
    def shards(self) -> Path:
        """See `DataSet`."""
        return self._folder / "coco"

    def commands(self) -> list[tuple[Path, list[str]]]:
        """See `DataSet`."""
        settings, drawn = self.settings, str(self._drawn)
        toy = ["pretrain.toy", drawn, "--images", str(settings.images), "--size", str(settings.image_size)]
        coco = ["coco", "--src", f"{drawn}/coco", "--tokenizer-vocab", str(settings.vocabulary)]
        vqav2 = ["vqav2", "--src", f"{drawn}/vqav2", "--images", f"{drawn}/coco"]
        prepared = [
            (folder, ["pretrain.prepare_shards", *options, "--out", str(folder), "--shard-size", "512"])
            for folder, options in ((self.shards, coco), (self._folder / "vqav2", vqav2))
        ]
        return [(self._drawn, toy), *prepared]

    def questions(self, split: str, seed: int) -> VqaSamples:
        """Questions of ``train`` or ``val``."""
        return VqaSamples(
            ShardIndex(self._folder / "vqav2" / split),
            self.tokenizer(),
            QUESTION_TOKENS,
            ImageTransform(self.settings.image_size),
            self.answers(),
            seed,
        )

    def answers(self) -> AnswerVocabulary:
        """Of the training questions."""
        return AnswerVocabulary.load(self._folder / "vqav2" / "answers.json")

    def guess(self) -> float:
        """See `DataSet`."""
        return blind_rates(self._drawn / "vqav2")["overall"]

    def run(self, variant: str, seed: int, stage: Stage) -> Outcome:
        """See `DataSet`; both stages use the same held-out questions."""
        settings = self.settings
        torch.manual_seed(seed)
        pretrained, metrics, pretraining = self.pretrain(variant, seed, ImageTransform(settings.image_size))
        contestant = settings.contestant(variant)
        model = contestant.build_vqa(pretrained, len(self.answers()), seed)
        task = VqaLoss(model)
        name = f"{self.name} {variant} seed {seed}: VQA"
        schedule = Schedule(name, settings.tuning_steps, settings.batch, settings.tuning_lr, seed)
        tuning = train(task, self.questions("train", seed), schedule, contestant.optimizer)
        fusion = contestant.fusion(model)
        recorder = GateRecorder(fusion)
        with recorder.recording():
            metrics |= self._accuracy(task, seed, recorder)
        costs = {}
        for forcing in forcings(fusion):
            with forced(fusion, forcing):
                costs[forcing] = self._accuracy(task, seed)[self.primary]
        training = {"pretraining": pretraining, "tuning": tuning}
        return Outcome(metrics, recorder.means(), recorder.spreads(), costs, model, training)

    def _accuracy(self, task: VqaLoss, seed: int, recorder: GateRecorder | None = None) -> dict[str, float]:
        vqa = Vqa(self.answers())

        def scores() -> Iterator[tuple[str, float]]:
            for loaded, counts in evaluation_batches(self.questions("val", seed), 0, 1, self.settings.batch, READER):
                rows = score_batch(vqa, on_cpu(task), dict(loaded), counts)
                if recorder:
                    kinds = [str(question["granularity"]) for question in loaded["question"]]
                    counted = zip(kinds, counts.tolist(), strict=True)
                    recorder.add(
                        [kind if is_counted else None for kind, is_counted in counted], loaded["attention_mask"]
                    )
                yield from ((row["groups"][1], row["accuracy"]) for row in rows)

        return {f"vqa_{group}": value for group, value in accuracy_by_group(scores()).items()}
