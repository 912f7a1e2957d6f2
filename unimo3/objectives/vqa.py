"""Visual question answering: scores over an answer vocabulary, trained on soft targets.

Source: METER, arXiv 2111.02387 (binary cross-entropy, summed over answers).
"""

from typing import Any

from torch import nn

from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.objectives.base import Losses, gate_report


class VqaLoss(nn.Module):
    """Batch -> loss, and the logits for evaluation."""

    def __init__(self, model: Unimo3ForVisualQuestionAnswering):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Losses:
        """Compute the loss.

        Args:
            batch: ``pixel_values`` [B, 3, S, S], ``input_ids`` and ``attention_mask`` [B, T], ``targets`` [B, answers].

        Returns:
            In training ``loss`` and the gates, see `gate_report`; in evaluation ``loss`` and ``logits`` [B, answers].
        """
        mask = batch["attention_mask"]
        out = self.model(
            batch["input_ids"], batch["pixel_values"], mask, labels=batch["targets"], output_gates=self.training
        )
        if not self.training:
            return {"loss": out.loss, "logits": out.logits.float()}
        return {"loss": out.loss} | gate_report(out.text_gates, out.image_gates, mask)
