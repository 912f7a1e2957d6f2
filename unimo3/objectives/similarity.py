"""Similarities of the texts and images of a step's batch by the contrastive head: the logits of ITC and of hard ITM.

Computed once a step for all objectives that read them. Features are gathered across ranks with their gradient.

Source: CLIP, arXiv 2103.00020; ALBEF, arXiv 2107.07651.
"""

# Shapes: R ranks, B samples a rank, N = R B.

from typing import NamedTuple

import torch
from torch import Tensor

from unimo3.distributed import gather_rows, world
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.unimo3 import Unimo3ForPreTraining

ContrastedModel = Unimo3ForPreTraining | Unimo3ForImageAndTextRetrieval
"""A model with a contrastive and a matching head."""


class Similarities(NamedTuple):
    """A rank's rows against the complete batch.

    Attributes:
        text_to_image: [B, N], cosines over the temperature.
        image_to_text: [B, N], the same.
        same_image: [B, N], True where both rows have one image id; a row's own partner is among them.
        indices: [B], of this rank's rows in the complete batch.
        temperature: [1], learned.
    """

    text_to_image: Tensor
    image_to_text: Tensor
    same_image: Tensor
    indices: Tensor
    temperature: Tensor


def compare(model: ContrastedModel, text: Tensor, image: Tensor, image_id: Tensor) -> Similarities:
    """Run the contrastive head on tower states of this rank's rows, and compare them with every rank's.

    Args:
        text: the text tower's states, [B, ...].
        image: the image tower's states, [B, ...].
        image_id: [B].
    """
    out = model.itc_head(text, image)
    num_rows = len(image_id)
    return Similarities(
        text_to_image=out.text @ gather_rows(out.image).T / out.temperature,
        image_to_text=out.image @ gather_rows(out.text).T / out.temperature,
        same_image=image_id[:, None] == gather_rows(image_id)[None, :],
        indices=torch.arange(num_rows, device=image_id.device) + world()[0] * num_rows,
        temperature=out.temperature,
    )
