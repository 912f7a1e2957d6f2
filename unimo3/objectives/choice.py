"""Scores of image-caption pairs by both of pretraining's heads; nothing is trained.

Source: ALBEF, arXiv 2107.07651, sections 3.2 and 4.
"""

from typing import Any

from torch import nn

from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.objectives.base import Losses


class ChoiceScores(nn.Module):
    """Batch -> the scores of its pairs."""

    def __init__(self, model: Unimo3ForImageAndTextRetrieval):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Losses:
        """Score each row's image with its caption.

        Args:
            batch: ``pixel_values`` [B, 3, S, S], ``input_ids`` and ``attention_mask`` [B, T].

        Returns:
            ``itm`` [B], how far "they match" is above "they do not", in logits; ``itc`` [B], the towers' cosine.
        """
        out = self.model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
        no, yes = out.logits.float().unbind(-1)
        return {"itm": yes - no, "itc": (out.text_embeds * out.image_embeds).sum(dim=-1)}
