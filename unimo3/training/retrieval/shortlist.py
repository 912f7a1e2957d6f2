"""Each query's likeliest candidates by the towers alone, in a gallery: the complete held-out set, or one of its folds.

At equal similarity the candidate that comes first in the data set is taken. Queries are compared in blocks that are the
same at any number of ranks, so the lists are too.

Source: ALBEF, arXiv 2107.07651, section 4.
"""

# Shapes: Q queries, C candidates of a gallery, k of a shortlist, I images, X texts, D width of the embeddings.

from typing import NamedTuple

import torch
from torch import Tensor

from unimo3.distributed import sum_over_ranks, world
from unimo3.metrics.recall import first_ranks

_BLOCK_QUERIES = 256


class Embeddings(NamedTuple):
    """A held-out set in the towers' common space, the same on every rank.

    Attributes:
        images: [I, D], unit vectors.
        texts: [X, D], the same, an image's texts together and in the images' order.
        image_of: [X] int64, the image each text belongs to.
    """

    images: Tensor
    texts: Tensor
    image_of: Tensor


class Shortlists(NamedTuple):
    """The shortlists of one kind of query in a gallery.

    Attributes:
        queries: [Q] int64, their numbers in the held-out set.
        candidates: [Q, k] int64, the same; a view of one row where it is all of the gallery.
        ranks: [Q], `first_ranks` by the towers among the complete gallery.
    """

    queries: Tensor
    candidates: Tensor
    ranks: Tensor


class Gallery(NamedTuple):
    """Images and texts that are ranked for each other."""

    text_lists: Shortlists
    """Texts for each image."""
    image_lists: Shortlists
    """Images for each text."""


def galleries_of(embeddings: Embeddings, fold_images: int, size: int, device: torch.device) -> list[Gallery]:
    """The complete set, and its folds of `fold_images` images in their order (0: none); every rank calls it.

    Args:
        size: candidates of a shortlist, k; 0, or more than there are: all.
        device: where similarities are computed.
    """
    num_images = len(embeddings.images)
    bounds = [(0, num_images)]
    if fold_images:
        bounds += [(start, start + fold_images) for start in range(0, num_images, fold_images)]
    galleries = []
    for start, end in bounds:
        images = torch.arange(start, end)
        texts = ((embeddings.image_of >= start) & (embeddings.image_of < end)).nonzero().flatten()
        of_images, of_texts = embeddings.images[images].to(device), embeddings.texts[texts].to(device)
        image_of = embeddings.image_of[texts].to(device)
        images_on = images.to(device)
        galleries.append(
            Gallery(
                _choose(images, of_images, images_on, texts, of_texts, image_of, size),
                _choose(texts, of_texts, image_of, images, of_images, images_on, size),
            )
        )
    return galleries


def _choose(
    queries: Tensor,
    query_embeds: Tensor,
    query_images: Tensor,
    candidates: Tensor,
    candidate_embeds: Tensor,
    candidate_images: Tensor,
    size: int,
) -> Shortlists:
    """The shortlists of all queries; each block of them is compared on one rank."""
    rank, num_ranks = world()
    takes_all = not 0 < size < len(candidates)
    lists = query_images.new_zeros(len(queries), 0 if takes_all else size)
    positions = query_images.new_zeros(len(queries))
    for start in range(rank * _BLOCK_QUERIES, len(queries), num_ranks * _BLOCK_QUERIES):
        rows = slice(start, start + _BLOCK_QUERIES)
        similarities = query_embeds[rows] @ candidate_embeds.T
        positions[rows] = first_ranks(similarities, query_images[rows, None] == candidate_images)
        if not takes_all:
            # A stable order: `topk` gives any of equal ones.
            ordered = similarities.nan_to_num(nan=-torch.inf).sort(dim=1, descending=True, stable=True)
            lists[rows] = ordered.indices[:, :size]
    lists, positions = sum_over_ranks(lists).cpu(), sum_over_ranks(positions).cpu()
    chosen = candidates.expand(len(queries), -1) if takes_all else candidates[lists]
    return Shortlists(queries, chosen, positions)
