"""Recall at k against a naive double loop: ties, five captions an image, k beyond the candidates, shortlists."""

import math

import pytest
import torch

from unimo3.metrics.recall import first_ranks, mean_of, recalls, shortlist_ranks

NUM_IMAGES, NUM_CAPTIONS = 7, 5
IMAGE_OF = torch.arange(NUM_IMAGES).repeat_interleave(NUM_CAPTIONS)


def drawn_scores(seed):
    """[images, texts] of few different values, so that most are tied."""
    return torch.randint(0, 6, (NUM_IMAGES, len(IMAGE_OF)), generator=torch.Generator().manual_seed(seed)).float()


def naive_recall(scores, is_right, k):
    """Fraction of rows with a correct column among the first k; of equal scores incorrect ones go first."""
    hits = 0
    for row, right in zip(scores.tolist(), is_right.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda column, row=row, right=right: (-row[column], right[column]))
        hits += any(right[column] for column in order[:k])
    return hits / len(scores)


@pytest.mark.parametrize("seed", range(8))
def test_recall_equals_a_double_loop_with_ties_and_five_captions(seed):
    scores = drawn_scores(seed)
    is_right = torch.arange(NUM_IMAGES)[:, None] == IMAGE_OF
    metrics = recalls(first_ranks(scores, is_right), first_ranks(scores.T, is_right.T))
    for k in (1, 5, 10):
        assert metrics[f"tr_at_{k}"] == pytest.approx(naive_recall(scores, is_right, k))
        assert metrics[f"ir_at_{k}"] == pytest.approx(naive_recall(scores.T, is_right.T, k))
    assert metrics["ir_at_10"] == 1  # there are seven images
    six = [metrics[f"{way}_at_{k}"] for way in ("tr", "ir") for k in (1, 5, 10)]
    assert metrics["recall_mean"] == pytest.approx(sum(six) / 6)


def test_equal_scores_do_not_help():
    is_right = torch.arange(NUM_IMAGES)[:, None] == IMAGE_OF
    metrics = recalls(*(first_ranks(torch.zeros(right.shape), right) for right in (is_right, is_right.T)))
    assert (metrics["tr_at_10"], metrics["ir_at_5"]) == (0, 0)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_not_a_number_is_the_lowest(bad):
    is_right = torch.tensor([[True, False, False]])
    assert first_ranks(torch.tensor([[bad, -9.0, bad]]), is_right).tolist() == [2]
    assert first_ranks(torch.tensor([[-9.0, bad, bad]]), is_right).tolist() == [0]


def test_a_query_without_a_right_candidate_never_counts():
    ranks = first_ranks(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert recalls(ranks, ranks)["tr_at_10"] == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_shortlist_comes_first_in_the_order_of_its_scores(seed, k):
    towers, fusion = drawn_scores(seed), drawn_scores(seed + 100)
    is_right = torch.arange(NUM_IMAGES)[:, None] == IMAGE_OF
    chosen = towers.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = []
    for row, right in enumerate(is_right.tolist()):
        shortlist = set(chosen[row].tolist())
        keys = {
            column: (column in shortlist, float((fusion if column in shortlist else towers)[row, column]))
            for column in range(len(IMAGE_OF))
        }
        best = max(key for column, key in keys.items() if right[column])
        expected.append(sum(key >= best for column, key in keys.items() if not right[column]))
    ranks = shortlist_ranks(fusion.gather(1, chosen), is_right.gather(1, chosen), first_ranks(towers, is_right))
    assert ranks.tolist() == expected


def test_metrics_of_folds_are_means():
    assert mean_of([{"a": 0.5, "b": 1.0}, {"a": 0.0, "b": 1.0}]) == {"a": 0.25, "b": 1.0}
