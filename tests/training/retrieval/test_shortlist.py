"""Shortlists by the towers: the likeliest of each gallery in a stable order, and galleries that are folds."""

import pytest
import torch
from torch.nn.functional import normalize

from unimo3.metrics.recall import first_ranks
from unimo3.training.retrieval.shortlist import Embeddings, galleries_of

NUM_IMAGES = 300
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embeddings():
    """More images than a block of queries, one to three texts each."""
    generator = torch.Generator().manual_seed(0)
    image_of = torch.arange(NUM_IMAGES).repeat_interleave(torch.arange(NUM_IMAGES) % 3 + 1)
    draw = [normalize(torch.randn(rows, 8, generator=generator), dim=-1) for rows in (NUM_IMAGES, len(image_of))]
    return Embeddings(*draw, image_of)


@pytest.mark.parametrize("fold_images", [0, 100])
def test_each_gallery_lists_its_most_similar_candidates(embeddings, fold_images):
    galleries = galleries_of(embeddings, fold_images, 7, CPU)
    bounds = [(0, NUM_IMAGES)] + [(start, start + 100) for start in range(0, NUM_IMAGES, 100) if fold_images]
    assert len(galleries) == len(bounds)
    for (of_images, of_texts), (start, end) in zip(galleries, bounds, strict=True):
        images = torch.arange(start, end)
        texts = ((embeddings.image_of >= start) & (embeddings.image_of < end)).nonzero().flatten()
        similarities = embeddings.images[images] @ embeddings.texts[texts].T
        is_right = images[:, None] == embeddings.image_of[texts]
        assert torch.equal(of_images.queries, images)
        assert torch.equal(of_texts.queries, texts)
        assert torch.equal(of_images.candidates, texts[similarities.topk(7, dim=1).indices])
        assert torch.equal(of_texts.candidates, images[similarities.T.topk(7, dim=1).indices])
        assert torch.equal(of_images.ranks, first_ranks(similarities, is_right))
        assert torch.equal(of_texts.ranks, first_ranks(similarities.T, is_right.T))


def test_of_equal_candidates_the_first_in_the_data_set_are_chosen(embeddings):
    equal = embeddings._replace(images=torch.ones_like(embeddings.images), texts=torch.ones_like(embeddings.texts))
    ((of_images, of_texts),) = galleries_of(equal, 0, 4, CPU)
    assert (of_images.candidates == torch.arange(4)).all()
    assert (of_texts.candidates == torch.arange(4)).all()


def test_a_shortlist_of_zero_or_more_than_all_is_all(embeddings):
    for size in (0, 10_000):
        ((of_images, of_texts),) = galleries_of(embeddings, 0, size, CPU)
        assert torch.equal(of_images.candidates[5], torch.arange(len(embeddings.texts)))
        assert torch.equal(of_texts.candidates[5], torch.arange(NUM_IMAGES))
