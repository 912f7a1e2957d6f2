"""Image-text matching: does this text belong to this image?

With random negatives half the texts of the step's batch get another image of that batch. With hard ones every
pair stays, and every text meets an image, and every image a text, that the contrastive head finds alike: three pairs
for one, a third of them positive. Partners come from the complete batch, from any rank.

Source: METER, arXiv 2111.02387 (random negatives, half the batch); ALBEF, arXiv 2107.07651, section 3.2 (hard ones).
"""

# Shapes: R ranks, B samples a rank, N = R B, P pairs a rank (B random, 3 B hard).

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimo3.distributed import gather_rows, take_rows, world
from unimo3.objectives.args import Negatives
from unimo3.objectives.base import FusedPairs, FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.negatives import draw_hard_negatives, draw_random_negatives, hard_negative_quantiles
from unimo3.objectives.similarity import ContrastedModel

IGNORED = -100
"""Label of a pair that does not count."""


class ImageTextMatching(Objective):
    """Two-class cross-entropy on the pooled state."""

    name = "itm"
    reads_plain_text = True
    reads_masked_text = False
    needs_other_images = True

    def __init__(self, weight: float, seed: int, negatives: Negatives = "random"):
        super().__init__(weight)
        self.seed = seed
        self.reads_similarities = negatives == "hard"

    def fusion_input(self, states: TowerStates) -> FusionInput:
        """Plain texts and images, positive and negative pairs; labels [P] are 1, 0 or `IGNORED`."""
        first_position = int(gather_rows(states.batch["positions"])[0])
        if self.reads_similarities:
            return self._hard_pairs(states, first_position)
        return self._random_pairs(states, first_position)

    def _random_pairs(self, states: TowerStates, first_position: int) -> FusionInput:
        assert states.plain_text is not None
        source = draw_random_negatives(gather_rows(states.batch["image_id"]), self.seed, first_position)
        rows = _local_rows(states)
        labels = (source[rows] == rows).long().to(states.image.device)
        image = take_rows(states.image, source)
        return FusionInput(states.plain_text, image, states.batch["attention_mask"], labels)

    def _hard_pairs(self, states: TowerStates, first_position: int) -> FusionInput:
        text, image, mask = states.plain_text, states.image, states.batch["attention_mask"]
        assert text is not None
        chosen = self._draw_hard(states, first_position)
        has_partner = chosen >= 0
        # A row without a possible partner gets its own, which is on this rank, and is skipped in the loss.
        image_source, text_source = torch.where(has_partner, chosen, torch.arange(len(chosen))[:, None]).unbind(1)
        rows = _local_rows(states)
        negative_labels = torch.where(has_partner[rows].T.flatten(), 0, IGNORED)
        return FusionInput(
            torch.cat([text, text, take_rows(text, text_source)]),
            torch.cat([image, take_rows(image, image_source), image]),
            torch.cat([mask, mask, take_rows(mask, text_source)]),
            torch.cat([torch.ones_like(rows), negative_labels]).to(image.device),
        )

    def _draw_hard(self, states: TowerStates, first_position: int) -> Tensor:
        """[N, 2] on the CPU, the same on all ranks: the row of each text's image and of each image's text, or -1."""
        sims = states.similarities
        assert sims is not None
        quantiles = hard_negative_quantiles(self.seed, first_position, sims.same_image.shape[1])[_local_rows(states)]
        images = draw_hard_negatives(sims.text_to_image, sims.same_image, quantiles[:, 0])
        texts = draw_hard_negatives(sims.image_to_text, sims.same_image, quantiles[:, 1])
        # Every row is drawn by one rank alone: two ranks' products of the same features may differ in the last bit.
        return gather_rows(torch.stack([images, texts], dim=1).to(states.image.device)).cpu()

    def losses(self, model: ContrastedModel, states: TowerStates, fused: FusedPairs | None) -> Losses:
        """The mean over the pairs that count."""
        assert fused is not None
        labels = fused.input.labels
        assert labels is not None
        logits = model.itm_head(model.unimo3.pool(fused.output)).float()
        # A batch of one image skips the negative pairs of every rank, any other none: ranks' means weigh the same.
        loss = cross_entropy(logits, labels, ignore_index=IGNORED)
        num_pairs = (labels != IGNORED).sum()
        accuracy = (logits.argmax(-1) == labels).sum() / num_pairs
        report = {"loss": loss, "accuracy": accuracy}
        if self.reports_rows:
            with torch.no_grad():
                of_pairs = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
            # Pairs are this rank's texts, once or three times.
            of_texts = torch.stack([of_pairs, (labels != IGNORED).float()], dim=1)
            report["rows"] = of_texts.unflatten(0, (-1, states.image.shape[0])).sum(0)
        return report


def _local_rows(states: TowerStates) -> Tensor:
    """[B] on the CPU: indices of this rank's rows in the complete batch."""
    batch = states.image.shape[0]
    return torch.arange(batch) + world()[0] * batch
