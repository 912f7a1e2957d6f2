"""Recall at k, with a rule for ties.

A query counts at k when any of its right candidates is among its first k. A right candidate comes after every wrong one
that scores as high: equal scores never help, and a constant score finds nothing. A score that is not a number is the
lowest of all.

Source: Karpathy and Fei-Fei, arXiv 1412.2306, for R@k, and for COCO's five folds of 1000 images.
"""

# Shapes: Q queries, C candidates.

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RANKS = (1, 5, 10)
# Position of a right candidate that does not exist: beyond any k.
_NOWHERE = torch.iinfo(torch.int64).max


def first_ranks(scores: Tensor, is_right: Tensor) -> Tensor:
    """Position of each query's best right candidate.

    Args:
        scores: [Q, C], the higher the better.
        is_right: [Q, C].

    Returns:
        [Q] int64, counted from 0: how many wrong candidates score at least as high.
    """
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
    ahead = ((scores >= best) & ~is_right).sum(dim=1)
    return torch.where(is_right.any(dim=1), ahead, _NOWHERE)


def shortlist_ranks(scores: Tensor, is_right: Tensor, tower_ranks: Tensor) -> Tensor:
    """Position of each query's best right candidate, when a reordered shortlist comes before the others.

    Args:
        scores: of the shortlist, [Q, k].
        is_right: [Q, k].
        tower_ranks: [Q], `first_ranks` by the scores that chose the shortlist, among all candidates. It applies where
            none of the shortlist is right: the shortlist then scores at least as high as the best right one.
    """
    return torch.where(is_right.any(dim=1), first_ranks(scores, is_right), tower_ranks)


def recalls(text_ranks: Tensor, image_ranks: Tensor) -> dict[str, float]:
    """Fraction of queries that count at 1, 5 and 10, and the mean of all six.

    Args:
        text_ranks: of each image's texts, [images] (text retrieval, ``tr_at_k``).
        image_ranks: of each text's image, [texts] (image retrieval, ``ir_at_k``).
    """
    metrics = {
        f"{name}_at_{k}": (positions < k).double().mean().item()
        for name, positions in (("tr", text_ranks), ("ir", image_ranks))
        for k in RANKS
    }
    return metrics | {"recall_mean": sum(metrics.values()) / len(metrics)}


def mean_of(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over folds."""
    return {name: sum(fold[name] for fold in folds) / len(folds) for name in folds[0]}
