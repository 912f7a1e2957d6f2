"""Settings of the pretraining objectives: a group for each, which stands next to the objective itself.

To add an objective, write its file, with a group of settings that has ``weight`` and ``build``, and a field here.
"""

from dataclasses import dataclass, field, fields

from unimo3.objectives.base import Objective
from unimo3.objectives.itc import ItcArgs
from unimo3.objectives.itm import ItmArgs
from unimo3.objectives.mlm import MlmArgs


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
        if not 0 < self.mlm.probability < 1:
            errors.append(f"objectives.mlm.probability: {self.mlm.probability}: a ratio between 0 and 1 is needed")
        return errors

    def build(self, seed: int) -> list[Objective]:
        """The objectives, in the order in which every rank computes them."""
        return [getattr(self, group.name).build(seed) for group in fields(self)]
