"""The negative partners of image-text matching: drawn at random, or by the similarity of text and image.

Every draw is decided by the run's seed and the batch's position in the sample order, so it is the same at any number of
ranks.

Source: METER, arXiv 2111.02387 (random); ALBEF, arXiv 2107.07651, section 3.2 (hard).
"""

# Shapes: R ranks, B samples a rank, N = R B.

import numpy as np
import torch
from torch import Tensor


def draw_random_negatives(image_id: Tensor, seed: int, position: int) -> Tensor:
    """Choose an image for every text: its own for one half, one with another image id for the other half.

    Args:
        image_id: [N] of the complete batch.
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


def hard_negative_quantiles(seed: int, position: int, num_rows: int) -> Tensor:
    """The random numbers behind a batch's hard negatives.

    Args:
        seed: of the run.
        position: of the batch's first sample in the sample order.
        num_rows: N.

    Returns:
        [N, 2] float64 in (0, 1], for each row's image and each row's text. A row's numbers do not depend on N.
    """
    return torch.from_numpy(1.0 - np.random.default_rng((seed, position)).random((num_rows, 2)))


def draw_hard_negatives(logits: Tensor, same_image: Tensor, quantiles: Tensor) -> Tensor:
    """Choose a partner for every row with probability proportional to exp(logit), among those of other images.

    Computed in float64 on the CPU, without gradient.

    Args:
        logits: [B, N], similarities of a rank's rows to the complete batch, over the temperature.
        same_image: [B, N], True where a partner has the row's image id.
        quantiles: [B] in (0, 1]: where in its cumulative distribution each row's draw lies.

    Returns:
        [B] of 0 to N - 1 on the CPU; -1 for a row without a possible partner.
    """
    logits = logits.detach().double().cpu()
    # A diverged model's logits leave nothing to draw from; its contrastive loss, not an index error here, shows it.
    possible = ~same_image.cpu() & logits.isfinite()
    has_partner = possible.any(dim=1)
    # The greatest logit is taken after the exclusion, else a near duplicate's could leave every other weight at zero.
    weights = logits.masked_fill(~possible, -torch.inf)[has_partner].softmax(dim=1)
    cumulative = weights.cumsum(dim=1)
    # The first entry to reach a threshold above 0 has a weight above 0, and the last one reaches every threshold.
    thresholds = quantiles[has_partner, None] * cumulative[:, -1:]
    chosen = torch.full((logits.shape[0],), -1)
    chosen[has_partner] = torch.searchsorted(cumulative, thresholds).squeeze(1)
    return chosen
