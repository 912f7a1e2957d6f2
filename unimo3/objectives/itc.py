"""Image-text contrast: each text's image among all images of the step's batch, and the reverse.

Pairs of one image (two captions of it in a batch) are no negatives of each other.

Source: CLIP, arXiv 2103.00020; ALBEF, arXiv 2107.07651.
"""

# Shapes: B samples a rank, N samples of all ranks.

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimo3.objectives.base import FusedPairs, FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.similarity import ContrastedModel


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

        def contrast(logits: Tensor, reduction: str = "mean") -> Tensor:
            masked = logits.masked_fill(excluded, -torch.inf)
            return cross_entropy(masked, similarities.indices, reduction=reduction)

        loss = (contrast(similarities.image_to_text) + contrast(similarities.text_to_image)) / 2
        report = {"loss": loss, "temperature": similarities.temperature.squeeze()}
        if self.reports_rows:
            with torch.no_grad():
                of_images, of_texts = (
                    contrast(similarities.image_to_text, "none"),
                    contrast(similarities.text_to_image, "none"),
                )
            report["rows"] = torch.stack([(of_images + of_texts) / 2, torch.ones_like(of_images)], dim=1)
        return report
