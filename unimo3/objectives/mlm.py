"""Masked language modeling: predict masked words from the text around them and the image.

Source: BERT, arXiv 1810.04805; on fused states as METER, arXiv 2111.02387.
"""

import torch
from torch.nn.functional import cross_entropy

from unimo3.distributed import sum_over_ranks, world
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.base import FusedPairs, FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.similarity import ContrastedModel


class MaskedLanguageModeling(Objective):
    """Cross-entropy over the masked tokens of all ranks."""

    name = "mlm"
    reads_plain_text = False
    reads_masked_text = True

    def fusion_input(self, states: TowerStates) -> FusionInput:
        """Masked texts with their own images."""
        assert states.masked_text is not None
        return FusionInput(states.masked_text, states.image, states.batch["attention_mask"])

    def losses(self, model: ContrastedModel, states: TowerStates, fused: FusedPairs | None) -> Losses:
        """The mean over masked tokens of the step's complete batch; scores are computed for masked tokens alone."""
        assert fused is not None
        assert isinstance(model, Unimo3ForPreTraining), "other models have no masked words to predict"
        labels = states.batch["mlm_labels"]
        masked = labels != -100
        targets = labels[masked]
        logits = model.mlm_head(fused.output.text[masked]).float()
        # Ranks mask different numbers of tokens: a mean of their means would not be the batch's mean.
        num_targets = sum_over_ranks(masked.sum()).clamp(min=1)
        size = world()[1]
        loss = cross_entropy(logits, targets, reduction="sum") * size / num_targets
        accuracy = (logits.argmax(-1) == targets).sum() * size / num_targets
        report = {"loss": loss, "accuracy": accuracy}
        if self.reports_rows:
            with torch.no_grad():
                of_tokens = cross_entropy(logits, targets, reduction="none")
            sums = of_tokens.new_zeros(len(labels)).index_add_(0, masked.nonzero()[:, 0], of_tokens)
            report["rows"] = torch.stack([sums, masked.sum(1).float()], dim=1)
        return report
