"""Classification of a text with its image or images: cross-entropy over the task's classes.

Source: METER, arXiv 2111.02387 (SNLI-VE and NLVR2).
"""

from typing import Any

from torch import nn

from unimo3.model.downstream import Unimo3ForImagesAndTextClassification, Unimo3ForImageTextClassification
from unimo3.objectives.base import Losses, gate_report


class ClassificationLoss(nn.Module):
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
            ``loss`` and ``accuracy``, the fraction of right rows; in training also the gates, see `gate_report`,
            in evaluation ``logits`` [B, classes].
        """
        label, images, mask = batch["label"], batch["pixel_values"], batch["attention_mask"]
        out = self.model(batch["input_ids"], images, mask, labels=label, output_gates=self.training)
        report = {"loss": out.loss, "accuracy": (out.logits.argmax(-1) == label).float().mean()}
        if not self.training:
            return report | {"logits": out.logits.float()}
        each = mask.repeat(2, 1) if images.dim() == 5 else mask  # the gates are those of both images
        return report | gate_report(out.text_gates, out.image_gates, each)
