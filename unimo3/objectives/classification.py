"""Classification of a text with its image or images: cross-entropy over the task's classes.

Source: METER, arXiv 2111.02387 (SNLI-VE and NLVR2).
"""

from typing import Any

from torch import nn

from unimo3.model.downstream import Unimo3ForImagesAndTextClassification, Unimo3ForImageTextClassification
from unimo3.objectives.base import Losses


class ClassificationTask(nn.Module):
    """Batch -> loss, and the logits for evaluation."""

    def __init__(self, model: Unimo3ForImageTextClassification | Unimo3ForImagesAndTextClassification):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Losses:
        """Compute the loss.

        Args:
            batch: ``pixel_values`` [B, 3, S, S], or [B, 2, 3, S, S] for two images a text, ``input_ids`` and
                ``attention_mask`` [B, T], ``label`` [B].

        Returns:
            In training ``loss`` and ``accuracy``, the share of rows that are right; in evaluation also ``logits``
            [B, classes].
        """
        label = batch["label"]
        out = self.model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], labels=label)
        accuracy = (out.logits.argmax(-1) == label).float().mean()
        report = {"loss": out.loss, "accuracy": accuracy}
        return report if self.training else report | {"logits": out.logits.float()}
