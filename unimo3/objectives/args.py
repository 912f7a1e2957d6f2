"""Settings of the pretraining objectives: a group for each.

To add an objective, write its file, and here a group of settings that has ``weight`` and ``build``, and a field.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from unimo3.objectives.base import Objective

Negatives = Literal["random", "hard"]
Contrasted = Literal["micro_step", "step"]


@dataclass(frozen=True)
class MlmArgs:
    """Masked language modeling."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 turns it off."""
    probability: float = 0.15
    """Fraction of a text's tokens to predict; of them 80 % are masked, 10 % replaced, 10 % unchanged."""

    def build(self, seed: int) -> "Objective":
        """The objective of a run with this seed."""
        from unimo3.objectives.mlm import MaskedLanguageModeling

        return MaskedLanguageModeling(self.weight)


@dataclass(frozen=True)
class ItmArgs:
    """Image-text matching."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 turns it off."""
    negatives: Negatives = "random"
    """How negative pairs are chosen from the micro-step. random: any other image, for half the texts. hard: for every
    text an image and for every image a text, drawn by the similarity that ITC learns; the fusion encoder then reads
    three pairs for one."""

    def build(self, seed: int) -> "Objective":
        """The objective of a run with this seed."""
        from unimo3.objectives.itm import ImageTextMatching

        return ImageTextMatching(self.weight, seed, self.negatives)


@dataclass(frozen=True)
class ItcArgs:
    """Image-text contrast between the towers."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 turns it off."""
    over: Contrasted = "micro_step"
    """Which pairs a pair is contrasted with, over all ranks. micro_step: those of its micro-step,
    training.micro_batch x ranks. step: those of the optimizer step, training.global_batch; with several micro-steps the
    towers run once more on each, without gradient, before the first. Evaluation always contrasts a micro-batch."""

    def build(self, seed: int) -> "Objective":
        """The objective of a run with this seed."""
        from unimo3.objectives.itc import ImageTextContrast

        return ImageTextContrast(self.weight)


@dataclass(frozen=True)
class ObjectivesArgs:
    """What pretraining optimizes: the weighted sum of these."""

    mlm: MlmArgs = field(default_factory=MlmArgs)
    itm: ItmArgs = field(default_factory=ItmArgs)
    itc: ItcArgs = field(default_factory=ItcArgs)

    @property
    def contrasts(self) -> bool:
        """Whether the pairs of a micro-step are compared with each other."""
        return self.itc.weight > 0 or self.itm.weight > 0

    @property
    def contrasts_step(self) -> bool:
        """Whether the pairs of an optimizer step are compared, which `PretrainingLoss.prepare_step` prepares."""
        return self.itc.over == "step"

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        weights = {group.name: getattr(self, group.name).weight for group in fields(self)}
        errors = [
            f"objectives.{name}.weight: {weight}: 0 (off) or more is needed"
            for name, weight in weights.items()
            if weight < 0
        ]
        if not any(weights.values()):
            errors.append(f"objectives: all weights are 0: give at least one of {', '.join(weights)} a weight")
        if self.itm.negatives == "hard" and self.itm.weight > 0 and self.itc.weight == 0:
            errors.append(
                "objectives.itm.negatives: hard: drawn by similarities that objectives.itc.weight: 0 leaves untrained; "
                "give ITC a weight above 0, or set objectives.itm.negatives to random"
            )
        if self.itc.over == "step" and self.itc.weight == 0:
            errors.append(
                "objectives.itc.over: step: has no effect with objectives.itc.weight: 0; give ITC a weight above 0, or "
                "set objectives.itc.over to micro_step"
            )
        if not 0 < self.mlm.probability < 1:
            errors.append(f"objectives.mlm.probability: {self.mlm.probability}: a ratio between 0 and 1 is needed")
        return errors

    def build(self, seed: int) -> "list[Objective]":
        """The objectives, in the order in which every rank computes them."""
        return [getattr(self, group.name).build(seed) for group in fields(self)]
