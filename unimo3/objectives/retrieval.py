"""Image-text retrieval: trained by contrast and by matching with hard negatives, evaluated in three parts.

Training's losses are pretraining's. Evaluation runs each tower once an image or a text, and then the fusion encoder on
their states, pair by pair; all go through this one module, as ZeRO-3 asks for.

Source: ALBEF, arXiv 2107.07651, sections 3.2 and 4.
"""

# Shapes: B samples, P pairs, n states of a tower, T text tokens, V image tokens, W tower width.

from typing import Any

from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.objectives.base import Losses, PretrainingLoss
from unimo3.objectives.itc import ImageTextContrast
from unimo3.objectives.itm import ImageTextMatching


class RetrievalLoss(PretrainingLoss):
    """Batch -> the sum of both losses; or what an evaluation needs, by the keys of the batch.

    Args:
        seed: of the run; it draws the negatives.
    """

    def __init__(self, model: Unimo3ForImageAndTextRetrieval, seed: int):
        super().__init__(model, [ImageTextMatching(1.0, seed, "hard"), ImageTextContrast(1.0)])

    def forward(self, batch: dict[str, Any]) -> Losses:
        """Compute the losses, or a part of an evaluation.

        Args:
            batch: ``pixel_values`` [B, 3, S, S], ``input_ids`` and ``attention_mask`` [B, T], ``image_id`` and
                ``positions`` [B] for the losses; ``pixel_values`` alone, or ``input_ids`` with its mask, for a tower;
                ``text_states`` [P, n, T, W], ``image_states`` [P, n, V, W] and ``attention_mask`` [P, T] for matching.

        Returns:
            The losses, see `PretrainingLoss`; of a tower ``states`` [B, n, tokens, W] and ``embeds`` [B, itc_size];
            of pairs ``scores`` [P], how far "they match" is above "they do not", in logits.
        """
        model = self.model
        if "image_states" in batch:
            fused = model.unimo3.fuse(batch["text_states"], batch["image_states"], batch["attention_mask"])
            no, yes = model.itm_head(model.unimo3.pool(fused)).float().unbind(-1)
            return {"scores": yes - no}
        if "input_ids" not in batch:
            states = model.unimo3.encode_image(batch["pixel_values"])
            return {"states": states, "embeds": model.itc_head.embed_image(states)}
        if "pixel_values" not in batch:
            states = model.unimo3.encode_text(batch["input_ids"], batch["attention_mask"])
            return {"states": states, "embeds": model.itc_head.embed_text(states)}
        return super().forward(batch)
