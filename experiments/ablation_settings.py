"""The ablation's variants, the settings that all runs have in common, and their toy data.

Source: METER, arXiv 2111.02387 (in_layer); BridgeTower, arXiv 2206.08657 (bridge); arXiv 2305.13697 (cross_layer).
"""

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.report import ROOT
from experiments.ablation_report import REFERENCE
from pretrain.toy import blind_rates
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.data.samples import PretrainSamples, VqaSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs

VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {"interaction": "in_layer", "bridge": False},
    "bridge": {"interaction": "in_layer", "bridge": True},
    "cross_layer_token": {"interaction": "cross_layer", "gate": "token", "bridge": False},
    "cross_layer_static": {"interaction": "cross_layer", "gate": "static", "bridge": False},
    "cross_layer_uniform": {"interaction": "cross_layer", "gate": "uniform", "bridge": False},
    "cross_layer_bridge": {"interaction": "cross_layer", "gate": "token", "bridge": True},
    "cross_layer_bridge_even": {"interaction": "cross_layer", "gate": "token", "bridge": True, "gate_init": 0.5},
    "cross_layer_unimodal": {"interaction": "cross_layer", "gate": "token", "bridge": False, "unimodal_levels": 2},
}
# Keys and values of tower layers are parameters that no other variant has a use for.
LARGER_VARIANTS = ("cross_layer_unimodal",)
VOCABULARY, PATCH_SIZE, CAPTION_TOKENS, QUESTION_TOKENS = 512, 16, 20, 24
MASKED_FRACTION = 0.15


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; a finished run counts only if all of it is equal."""

    images: int = 8000
    """Toy images, training and held-out ones."""
    image_size: int = 64
    """Their height and width in pixels."""
    layers: int = 3
    """Layers of each tower and of the fusion encoder."""
    width: int = 128
    """Width of all three."""
    pretraining_steps: int = 250
    """Optimizer steps of MLM, ITM and ITC together."""
    vqa_steps: int = 350
    """Optimizer steps of fine-tuning."""
    batch: int = 64
    """Pairs or questions a step."""
    pretraining_lr: float = 1e-3
    """Peak learning rate of pretraining."""
    vqa_lr: float = 5e-4
    """Peak learning rate of fine-tuning."""

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        least = {"images": 40, "batch": 2}
        errors = [
            f"{option(field.name)} {getattr(self, field.name)}: at least {least.get(field.name, 1)} is needed"
            for field in fields(self)
            if field.type is int and getattr(self, field.name) < least.get(field.name, 1)
        ]
        errors += [
            f"{option(name)} {getattr(self, name)}: a number above 0 is needed"
            for name in ("pretraining_lr", "vqa_lr")
            if getattr(self, name) <= 0
        ]
        # An error that all variants have is reported once.
        of_models = [error for variant in VARIANTS for error in self.model(variant).validate()]
        return errors or list(dict.fromkeys(of_models))

    def model(self, variant: str) -> ModelArgs:
        """A variant's model; all but the interaction is as in pretrain/recipes/tiny.yaml."""
        return toy_model(self.width, self.layers, self.image_size, VOCABULARY, **VARIANTS[variant])


class Data:
    """The toy shards in a folder."""

    def __init__(self, work: Path, settings: Settings):
        self._settings = settings
        self._folder = work.resolve() / f"data_{settings.images}_{settings.image_size}"
        self._shards = self._folder / "shards"

    def make(self) -> None:
        """Draw and shard the data that is not there yet; each command makes a complete folder or none."""
        drawn = self._folder / "drawn"
        toy = ("toy", str(drawn), "--images", str(self._settings.images), "--size", str(self._settings.image_size))
        coco = ("prepare_shards", "coco", "--src", str(drawn / "coco"), "--tokenizer-vocab", str(VOCABULARY))
        vqav2 = ("prepare_shards", "vqav2", "--src", str(drawn / "vqav2"), "--images", str(drawn / "coco"))
        for folder, (program, *arguments) in (
            (drawn, toy),
            (self._shards / "coco", (*coco, "--out", str(self._shards / "coco"), "--shard-size", "512")),
            (self._shards / "vqav2", (*vqav2, "--out", str(self._shards / "vqav2"), "--shard-size", "512")),
        ):
            if not folder.exists():
                subprocess.run([sys.executable, "-m", f"pretrain.{program}", *arguments], cwd=ROOT, check=True)

    def pairs(self, split: str, seed: int) -> PretrainSamples:
        """Captioned images of ``train`` or ``val``."""
        return PretrainSamples(
            ShardIndex(self._shards / "coco" / split),
            self.tokenizer(),
            CAPTION_TOKENS,
            ImageTransform(self._settings.image_size),
            MASKED_FRACTION,
            seed,
        )

    def questions(self, split: str, seed: int) -> VqaSamples:
        """Questions of ``train`` or ``val``."""
        return VqaSamples(
            ShardIndex(self._shards / "vqav2" / split),
            self.tokenizer(),
            QUESTION_TOKENS,
            ImageTransform(self._settings.image_size),
            self.answers(),
            seed,
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Trained on the training captions."""
        return load_tokenizer(str(self._shards / "coco" / "tokenizer"))

    def answers(self) -> AnswerVocabulary:
        """Of the training questions."""
        return AnswerVocabulary.load(self._shards / "vqav2" / "answers.json")

    def blind(self) -> dict[str, float]:
        """VQA accuracy of the best guess from the question alone."""
        return blind_rates(self._folder / "drawn" / "vqav2")


def option(field: str) -> str:
    """A setting's name on the command line."""
    return f"--{field.replace('_', '-')}"


def toy_model(width: int, num_layers: int, image_size: int, vocab_size: int, **others: Any) -> ModelArgs:
    """A model of towers and a fusion encoder of one size; all but that is as in pretrain/recipes/tiny.yaml."""
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    return ModelArgs(
        text=TextArgs(
            vocab_size=vocab_size, intermediate_size=4 * width, max_position_embeddings=40, dropout=0.0, **sizes
        ),
        vision=VisionArgs(image_size=image_size, patch_size=PATCH_SIZE, width=width, depth=num_layers, num_heads=4),
        initializer_range=0.08,
        dropout=0.0,
        itc_size=64,
        **sizes,
        **others,
    )
