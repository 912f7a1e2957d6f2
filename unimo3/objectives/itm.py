"""Image-text matching: does this text belong to this image?

Half the texts of the step's batch are given another image of that batch, whichever rank holds it. The draw is seeded
by the batch's position in the sample order, so it is the same at any number of ranks.

Source: METER, arXiv 2111.02387 (random negatives, half the batch).
"""

# Shapes: R ranks, B samples a rank, N = R B.

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimo3.distributed import world
from unimo3.model.fusion import FusionOutput
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.base import FusionInput, Losses, Objective, TowerStates
from unimo3.objectives.exchange import gather_rows, take_rows


def draw_random_negatives(image_id: Tensor, seed: int, position: int) -> Tensor:
    """Choose an image for every text: its own for one half, one with another image id for the other half.

    Args:
        image_id: [N] of the whole batch.
        seed: of the run.
        position: of the batch's first sample in the sample order.

    Returns:
        [N], the row whose image each text gets. A text keeps its own where no image with another id is in the batch.
    """
    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    num_rows = image_id.shape[0]
    source = torch.arange(num_rows)
    ids = image_id.cpu()
    for row in torch.randperm(num_rows, generator=generator)[: num_rows // 2].tolist():
        others = (ids != ids[row]).nonzero().flatten()
        if len(others):
            source[row] = others[torch.randint(len(others), (1,), generator=generator)]
    return source


class ImageTextMatching(Objective):
    """Two-class cross-entropy on the pooled state."""

    name = "itm"
    reads_plain_text = True
    reads_masked_text = False

    def __init__(self, weight: float, seed: int):
        super().__init__(weight)
        self.seed = seed

    def fusion_input(self, states: TowerStates) -> FusionInput:
        """Plain texts with their own or another image."""
        assert states.plain_text is not None
        first_position = int(gather_rows(states.batch["positions"])[0])
        source = draw_random_negatives(gather_rows(states.batch["image_id"]), self.seed, first_position)
        rank, _ = world()
        batch = states.image.shape[0]
        own = slice(rank * batch, (rank + 1) * batch)
        is_own = source[own] == torch.arange(len(source))[own]
        labels = is_own.long().to(states.image.device)
        return FusionInput(states.plain_text, take_rows(states.image, source), labels)

    def losses(
        self,
        model: Unimo3ForPreTraining,
        states: TowerStates,
        request: FusionInput | None,
        fused: FusionOutput | None,
    ) -> Losses:
        """The mean over the batch."""
        assert fused is not None
        assert request is not None
        assert request.labels is not None
        logits = model.itm_head(model.unimo3.pool(fused)).float()
        accuracy = (logits.argmax(-1) == request.labels).float().mean()
        return {"loss": cross_entropy(logits, request.labels), "accuracy": accuracy}
