"""Image-text contrast: each text's image among all images of the step's batch, and the reverse.

Pairs of one image (two captions of it in a batch) are no negatives of each other.

Source: CLIP, arXiv 2103.00020; ALBEF, arXiv 2107.07651.
"""

# Shapes: B samples a rank, N samples of all ranks.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimo3.objectives.base import FusedPairs, FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.similarity import ContrastedModel


@dataclass(frozen=True)
class ItcArgs:
    """Image-text contrast between the towers."""

    weight: float = 1.0
    """Factor of its loss in the total; 0 turns it off."""

    def build(self, seed: int) -> Objective:
        """The objective of a run with this seed."""
        return ImageTextContrast(self.weight)


class ImageTextContrast(Objective):
    """Mean of the image-to-text and the text-to-image cross-entropy."""

    name = "itc"
    reads_plain_text = True
    reads_masked_text = False
    reads_similarities = True
    needs_other_images = True

    def fusion_input(self, states: TowerStates) -> FusionInput | None:
        """None: the contrast is between the towers."""
        return None

    def losses(self, model: ContrastedModel, states: TowerStates, fused: FusedPairs | None) -> Losses:
        """The mean over this rank's rows, each against the complete batch."""
        similarities = states.similarities
        assert similarities is not None
        excluded = similarities.same_image.scatter(1, similarities.indices[:, None], False)

        def contrast(logits: Tensor) -> Tensor:
            return cross_entropy(logits.masked_fill(excluded, -torch.inf), similarities.indices)

        loss = (contrast(similarities.image_to_text) + contrast(similarities.text_to_image)) / 2
        return {"loss": loss, "temperature": similarities.temperature.squeeze()}
