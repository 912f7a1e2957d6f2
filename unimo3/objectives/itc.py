"""Image-text contrast: each text's image among all images of the step's batch, and the reverse.

Features are gathered across ranks with their gradient. Pairs of one image (two captions of it in a batch) are no
negatives of each other.

Source: CLIP, arXiv 2103.00020; ALBEF, arXiv 2107.07651.
"""

# Shapes: R ranks, B samples a rank, N = R B.

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimo3.distributed import world
from unimo3.model.fusion import FusionOutput
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.base import FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.exchange import gather_rows


class ImageTextContrast(Objective):
    """Mean of the image-to-text and the text-to-image cross-entropy."""

    name = "itc"
    reads_plain_text = True
    reads_masked_text = False

    def fusion_input(self, states: TowerStates) -> FusionInput | None:
        """None: the contrast is between the towers."""
        return None

    def losses(
        self,
        model: Unimo3ForPreTraining,
        states: TowerStates,
        request: FusionInput | None,
        fused: FusionOutput | None,
    ) -> Losses:
        """The mean over this rank's rows, each against the whole batch."""
        out = model.itc_head(states.plain_text, states.image)
        image_id = states.batch["image_id"]
        all_ids = gather_rows(image_id)
        target = torch.arange(len(image_id), device=image_id.device) + world()[0] * len(image_id)
        same_image = image_id[:, None] == all_ids[None, :]
        same_image[torch.arange(len(target), device=target.device), target] = False

        def contrast(own: Tensor, others: Tensor) -> Tensor:
            logits = (own @ others.T / out.temperature).masked_fill(same_image, -torch.inf)
            return cross_entropy(logits, target)

        loss = (contrast(out.image, gather_rows(out.text)) + contrast(out.text, gather_rows(out.image))) / 2
        return {"loss": loss, "temperature": out.temperature.squeeze()}
