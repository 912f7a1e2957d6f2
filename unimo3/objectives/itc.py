"""Image-text contrast: each text's image among all images of a batch, and the reverse.

The batch is one micro-step over all ranks, or the complete optimizer step.

Source: CLIP, arXiv 2103.00020; ALBEF, arXiv 2107.07651.
"""

import torch

from unimo3.objectives.base import FusedPairs, FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.similarity import ContrastedModel, contrastive_loss


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
        """The mean over this rank's rows, each against the complete batch.

        With a batch that `PretrainingLoss.prepare_step` has prepared, both are those of the optimizer step.
        """
        features, similarities = states.features, states.similarities
        assert similarities is not None
        contrast = states.step_contrast
        if contrast is not None:
            assert features is not None
            loss = contrast.loss_of(features)
        else:
            loss = contrastive_loss(similarities)
        report = {"loss": loss, "temperature": similarities.temperature.squeeze()}
        if self.reports_rows:
            with torch.no_grad():
                of_rows = contrastive_loss(similarities, "none") if contrast is None else contrast.row_losses
            report["rows"] = torch.stack([of_rows, torch.ones_like(of_rows)], dim=1)
        return report
