"""Scores of image-text pairs by the fusion encoder, from the towers' cached states.

A pair belongs to the rank that has its image. Its number is image x texts + text, so that pairs in order share
images. All ranks fuse the same number of batches; a rank that has fewer adds pairs that do not count.

Source: ALBEF, arXiv 2107.07651, section 4.
"""

# Shapes: I images, X texts, P pairs of a rank, Q queries, k of a shortlist.

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimo3.distributed import all_gather_object, sum_over_ranks
from unimo3.engine import Engine
from unimo3.metrics.recall import shortlist_ranks
from unimo3.training.evaluation import Guard
from unimo3.training.retrieval.shortlist import Embeddings, Gallery, Shortlists
from unimo3.training.retrieval.states import StateBlock, Towers

# Queries whose scores are looked up at a time.
_BLOCK_QUERIES = 1024


class PairScores(NamedTuple):
    """A rank's pairs, [P] in rising order, and their scores, [P]."""

    pairs: Tensor
    scores: Tensor


class PairBatch(NamedTuple):
    """Indices of images and texts in their blocks, [pairs] each, and of the pairs that count in all of the rank's."""

    images: Tensor
    texts: Tensor
    rows: Tensor


def local_pairs(galleries: Sequence[Gallery], local_images: Tensor, num_images: int, num_texts: int) -> Tensor:
    """The pairs of all shortlists whose image is one of `local_images`, each once, in rising order: [P]."""
    is_local = torch.zeros(num_images, dtype=torch.bool)
    is_local[local_images] = True
    if any(len(lists.queries) * lists.candidates.shape[1] == num_images * num_texts for lists in galleries[0]):
        return (local_images[:, None] * num_texts + torch.arange(num_texts)).flatten()
    parts = []
    for of_images, of_texts in galleries:
        mask = is_local[of_images.queries]
        parts.append((of_images.queries[mask, None] * num_texts + of_images.candidates[mask]).flatten())
        texts = of_texts.queries[:, None].expand_as(of_texts.candidates)
        mask = is_local[of_texts.candidates]
        parts.append(of_texts.candidates[mask] * num_texts + texts[mask])
    return torch.cat(parts).unique()


@torch.no_grad()
def score(
    engine: Engine, towers: Towers, pairs: Tensor, num_texts: int, batch: int, pair_batch: int, guard: Guard
) -> PairScores:
    """Score this rank's pairs; every rank calls it. What it returns does not count if the guard was cut.

    Args:
        engine: over a `RetrievalLoss`, in evaluation mode.
        pairs: [P], see `local_pairs`.
        batch: images of a batch of the towers.
    """
    scores = torch.full((len(pairs),), torch.nan)
    image_numbers = towers.local_images()
    for images in towers.image_blocks():
        for texts in towers.text_blocks():
            batches = _batches(pairs, image_numbers[images.start : images.end], texts, num_texts, batch, pair_batch)
            num_batches = max(all_gather_object(len(batches)))
            nothing = torch.zeros(pair_batch, dtype=torch.long)
            batches += [PairBatch(nothing, nothing, nothing[:0])] * (num_batches - len(batches))
            for one in guard.batches(iter(batches)):
                mask = towers.masks[(texts.start + one.texts).clamp(max=num_texts - 1)]
                report = engine(
                    {
                        "text_states": _rows(texts, one.texts, engine.device),
                        "image_states": _rows(images, one.images, engine.device),
                        "attention_mask": mask.to(engine.device),
                    }
                )
                scores[one.rows] = report["scores"][: len(one.rows)].cpu()
            if guard.is_stopped:
                return PairScores(pairs, scores)
    return PairScores(pairs, scores)


def _rows(block: StateBlock, indices: Tensor, device: torch.device) -> Tensor:
    """Rows of a block; each is copied to the device once, however often it is used."""
    wanted, inverse = indices.unique(return_inverse=True)
    return block.states[wanted].to(device, non_blocking=True)[inverse.to(device)]


def _batches(
    pairs: Tensor, image_numbers: Tensor, texts: StateBlock, num_texts: int, batch: int, pair_batch: int
) -> list[PairBatch]:
    """Batches of one size out of each of the towers' image batches: the same ones, whichever rank has it.

    Args:
        image_numbers: of a block; -1: none.
    """
    batches = []
    for start in range(0, len(image_numbers), batch):
        first = int(image_numbers[start])
        if first < 0:
            break
        low, high = torch.searchsorted(pairs, torch.tensor([first, first + batch]) * num_texts).tolist()
        text = pairs[low:high] % num_texts
        rows = ((text >= texts.start) & (text < texts.end)).nonzero().flatten() + low
        for part in rows.split(pair_batch) if len(rows) else ():
            filled = torch.cat([part, part[-1:].expand(pair_batch - len(part))])
            image = pairs[filled] // num_texts - first + start
            batches.append(PairBatch(image, pairs[filled] % num_texts - texts.start, part))
    return batches


def final_ranks(
    galleries: Sequence[Gallery], scored: PairScores, embeds: Embeddings, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each gallery the positions of every image's best text and of every text's image; every rank calls it.

    Shortlisted candidates come first, by their scores; the others follow as the towers order them.
    """
    images, num_texts = torch.arange(len(embeds.images)), len(embeds.texts)

    def positions(lists: Shortlists, by_image: bool) -> Tensor:
        parts = []
        for rows in torch.arange(len(lists.queries)).split(_BLOCK_QUERIES):
            queries, candidates = lists.queries[rows, None], lists.candidates[rows]
            pairs = queries * num_texts + candidates if by_image else candidates * num_texts + queries
            image_of_query, image_of_candidate = (images, embeds.image_of) if by_image else (embeds.image_of, images)
            is_right = image_of_query[queries] == image_of_candidate[candidates]
            parts.append(shortlist_ranks(_look_up(scored, pairs, device), is_right, lists.ranks[rows]))
        return torch.cat(parts)

    for of_images, of_texts in galleries:
        yield positions(of_images, by_image=True), positions(of_texts, by_image=False)


def _look_up(scored: PairScores, pairs: Tensor, device: torch.device) -> Tensor:
    """Scores of pairs, from the ranks that have them."""
    if len(scored.pairs):
        index = torch.searchsorted(scored.pairs, pairs).clamp(max=len(scored.pairs) - 1)
        local_scores = torch.where(scored.pairs[index] == pairs, scored.scores[index], 0.0)
    else:
        local_scores = torch.zeros(pairs.shape)
    return sum_over_ranks(local_scores.to(device)).cpu()
