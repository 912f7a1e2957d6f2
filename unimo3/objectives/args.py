"""Settings of the pretraining objectives, and their construction."""

from dataclasses import dataclass, field

from unimo3.objectives.base import Objective
from unimo3.objectives.itc import ImageTextContrast
from unimo3.objectives.itm import ImageTextMatching, Negatives
from unimo3.objectives.mlm import MaskedLanguageModeling


@dataclass(frozen=True)
class MlmArgs:
    """Masked language modelling."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 leaves it out."""
    probability: float = 0.15
    """Share of a text's tokens to predict; of them 80 % are masked, 10 % replaced, 10 % kept."""


@dataclass(frozen=True)
class ItmArgs:
    """Image-text matching."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 leaves it out."""
    negatives: Negatives = "random"
    """How wrong pairs are chosen out of the step's batch. random: any other image, for half the texts. hard: for every
    text an image and for every image a text, drawn by the similarity that ITC learns; the fusion encoder then reads
    three pairs for one."""


@dataclass(frozen=True)
class ItcArgs:
    """Image-text contrast between the towers."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 leaves it out."""


@dataclass(frozen=True)
class ObjectivesArgs:
    """What pretraining optimises: the weighted sum of these."""

    mlm: MlmArgs = field(default_factory=MlmArgs)
    itm: ItmArgs = field(default_factory=ItmArgs)
    itc: ItcArgs = field(default_factory=ItcArgs)

    def validate(self) -> list[str]:
        """Say what is wrong with these settings, one line an error."""
        weights = {name: getattr(self, name).weight for name in ("mlm", "itm", "itc")}
        found = [
            f"objectives.{name}.weight: {weight}: 0 (off) or more is needed"
            for name, weight in weights.items()
            if weight < 0
        ]
        if not any(weights.values()):
            found.append("objectives: all weights are 0: give at least one of mlm, itm and itc a weight")
        if self.itm.negatives == "hard" and self.itm.weight > 0 and self.itc.weight == 0:
            found.append(
                "objectives.itm.negatives: hard: drawn by similarities that objectives.itc.weight: 0 leaves untrained; "
                "give ITC a weight above 0, or set objectives.itm.negatives to random"
            )
        if not 0 < self.mlm.probability < 1:
            found.append(f"objectives.mlm.probability: {self.mlm.probability}: a share between 0 and 1 is needed")
        return found

    def build(self, seed: int) -> list[Objective]:
        """The objectives, in the order in which every rank computes them."""
        return [
            MaskedLanguageModeling(self.mlm.weight),
            ImageTextMatching(self.itm.weight, seed, self.itm.negatives),
            ImageTextContrast(self.itc.weight),
        ]
