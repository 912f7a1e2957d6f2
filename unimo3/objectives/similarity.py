"""Similarities of the texts and images of a step's batch by the contrastive head: the logits of ITC and of hard ITM.

Computed once a step for all objectives that read them. Features are gathered across ranks with their gradient.

Source: CLIP, arXiv 2103.00020; ALBEF, arXiv 2107.07651.
"""

# Shapes: R ranks, B samples a rank, N = R B, D itc_size.

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimo3.distributed import gather_rows, world
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.heads import ItcOutput
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


def compare(features: ItcOutput, image_id: Tensor) -> Similarities:
    """Compare this rank's rows with every rank's.

    Args:
        features: of this rank's rows.
        image_id: [B].
    """
    num_rows = len(image_id)
    indices = torch.arange(num_rows, device=image_id.device) + world()[0] * num_rows
    batch = ItcOutput(gather_rows(features.text), gather_rows(features.image), features.temperature)
    return compare_rows(features, image_id, batch, gather_rows(image_id), indices)


def compare_rows(
    rows: ItcOutput, row_ids: Tensor, batch: ItcOutput, batch_ids: Tensor, indices: Tensor
) -> Similarities:
    """Compare some rows of a complete batch with all of it.

    Args:
        rows: their features.
        row_ids: [B], their image ids.
        batch: features of the complete batch.
        batch_ids: [N], its image ids.
        indices: [B], of the rows in the complete batch.
    """
    return Similarities(
        text_to_image=rows.text @ batch.image.T / rows.temperature,
        image_to_text=rows.image @ batch.text.T / rows.temperature,
        same_image=row_ids[:, None] == batch_ids[None, :],
        indices=indices,
        temperature=rows.temperature,
    )


def contrastive_loss(similarities: Similarities, reduction: str = "mean") -> Tensor:
    """The mean of the image-to-text and the text-to-image cross-entropy.

    Pairs of one image (two captions of it in a batch) are no negatives of each other.

    Args:
        reduction: over the rows: ``mean``, or ``none`` for the loss of each, [B].
    """
    excluded = similarities.same_image.scatter(1, similarities.indices[:, None], False)

    def contrast(logits: Tensor) -> Tensor:
        masked = logits.masked_fill(excluded, -torch.inf)
        return cross_entropy(masked, similarities.indices, reduction=reduction)

    return (contrast(similarities.image_to_text) + contrast(similarities.text_to_image)) / 2
