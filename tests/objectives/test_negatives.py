"""Draws of negatives: never of the same image, at the expected frequencies, and valid at extreme similarities."""

import pytest
import torch

from unimo3.objectives.negatives import draw_hard_negatives, draw_random_negatives, hard_negative_quantiles

# Chance of a larger statistic below 0.001 at 5 degrees of freedom.
CHI_SQUARE_5 = 20.5


def chi_square(chosen, probabilities):
    expected = probabilities * len(chosen)
    counts = torch.bincount(chosen, minlength=len(probabilities))
    assert not counts[expected == 0].any()
    possible = expected > 0
    return float(((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum())


def many_draws(logits, same_image, column):
    """One row's draws at 10,000 positions: 1,250 seeds of 8 rows each."""
    quantiles = torch.cat([hard_negative_quantiles(seed, 8 * seed, 8) for seed in range(1250)])[:, column]
    repeated = logits.expand(len(quantiles), -1), same_image.expand(len(quantiles), -1)
    return draw_hard_negatives(*repeated, quantiles)


# Random.


def test_random_negatives_give_half_the_texts_another_image():
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    sources = [draw_random_negatives(ids, seed=0, position=position) for position in range(0, 200, 10)]
    for source in sources:
        changed = source != torch.arange(10)
        assert changed.sum() == 5
        assert (ids[source[changed]] != ids[changed.nonzero().flatten()]).all()
    assert len({tuple(source.tolist()) for source in sources}) > 15
    assert torch.equal(sources[3], draw_random_negatives(ids, seed=0, position=30))


def test_random_negatives_of_a_seed_and_position_never_change():
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert draw_random_negatives(ids, seed=0, position=30).tolist() == [4, 8, 9, 3, 9, 5, 6, 7, 8, 5]


def test_a_batch_of_one_image_has_no_random_negatives():
    same = draw_random_negatives(torch.zeros(6, dtype=torch.long), seed=0, position=0)
    assert torch.equal(same, torch.arange(6))


# Hard.


@pytest.mark.parametrize("column", [0, 1])
def test_hard_negatives_follow_the_softmax_over_other_images(column):
    logits = torch.tensor([2.0, 0.5, -1.0, 9.0, 1.0, 0.0, 7.0, 1.5])
    same_image = torch.tensor([False, False, False, True, False, False, True, False])
    probabilities = logits.double().masked_fill(same_image, -torch.inf).softmax(0)
    assert chi_square(many_draws(logits, same_image, column), probabilities) < CHI_SQUARE_5


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 65504.0])
def test_equal_similarities_are_drawn_evenly_at_any_size(value):
    logits = torch.tensor([value] * 6 + [1e4, value - 1e4])
    same_image = torch.tensor([False] * 6 + [True, False])
    probabilities = torch.tensor([1 / 6] * 6 + [0.0, 0.0], dtype=torch.float64)
    assert chi_square(many_draws(logits, same_image, 0), probabilities) < CHI_SQUARE_5


def test_equal_partners_are_equally_likely_in_half_precision():
    num_partners = 3000
    partners = torch.arange(0, num_partners, 29)
    # The middle of a partner's interval must choose that very partner.
    quantiles = (partners.double() + 0.5) / num_partners
    logits = torch.full((len(partners), num_partners), 3.0, dtype=torch.float16)
    chosen = draw_hard_negatives(logits, torch.zeros_like(logits, dtype=torch.bool), quantiles)
    assert torch.equal(chosen, partners)


def test_hard_negatives_never_have_the_same_image_among_many_duplicates():
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        ids = torch.randint(4, (64,), generator=generator)
        same_image = ids[:, None] == ids[None, :]
        # The same image attracts as strongly as can be.
        logits = torch.where(same_image, 1e4, -1e4) + torch.randn(64, 64, generator=generator)
        chosen = draw_hard_negatives(logits, same_image, hard_negative_quantiles(seed, 0, 64)[:, 0])
        assert (ids[chosen] != ids).all()


@pytest.mark.parametrize("size", [1e4, torch.finfo(torch.float16).max])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_partner_that_outweighs_all_others_is_always_drawn(size, dtype):
    logits = torch.full((5, 6), -size, dtype=dtype)
    logits[:, 4] = size
    logits[:, 0] = size
    same_image = torch.zeros(5, 6, dtype=torch.bool)
    same_image[:, 0] = True
    for seed in range(20):
        chosen = draw_hard_negatives(logits, same_image, hard_negative_quantiles(seed, 0, 5)[:, 1])
        assert (chosen == 4).all()


@pytest.mark.parametrize("quantile", [2.0**-53, 1.0])
def test_the_ends_of_the_distribution_stay_within_the_possible_partners(quantile):
    # The weights' sum rounds, and the likeliest partners at both ends are excluded.
    logits = torch.tensor([[5.0, 0.1, 0.2, 0.3, 0.1, 0.2, 5.0]])
    same_image = torch.tensor([[True, False, False, False, False, False, True]])
    chosen = draw_hard_negatives(logits, same_image, torch.tensor([quantile], dtype=torch.float64))
    assert chosen.item() == (5 if quantile == 1.0 else 1)


def test_a_row_without_another_image_has_no_hard_negative():
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    same_image = torch.tensor([[True, True, True], [False, True, False], [True, True, True]])
    chosen = draw_hard_negatives(logits, same_image, hard_negative_quantiles(0, 0, 3)[:, 0])
    assert chosen[[0, 2]].tolist() == [-1, -1]
    assert chosen[1] in (0, 2)


def test_similarities_that_are_not_finite_are_never_drawn():
    logits = torch.tensor([[0.0, torch.nan, torch.inf, 1.0], [torch.nan] * 4])
    none_alike = torch.zeros(2, 4, dtype=torch.bool)
    for seed in range(20):
        first, second = draw_hard_negatives(logits, none_alike, hard_negative_quantiles(seed, 0, 2)[:, 0]).tolist()
        assert first in (0, 3)
        assert second == -1


def test_a_draw_depends_on_seed_position_row_and_direction_alone():
    numbers = hard_negative_quantiles(seed=1, position=40, num_rows=6)
    assert numbers.dtype == torch.float64
    assert len(set(numbers.flatten().tolist())) == 12
    assert torch.equal(numbers, hard_negative_quantiles(1, 40, 9)[:6])
    assert not torch.equal(numbers, hard_negative_quantiles(2, 40, 6))
    assert not torch.equal(numbers, hard_negative_quantiles(1, 46, 6))


def test_hard_draws_have_no_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    chosen = draw_hard_negatives(logits, torch.zeros(2, 3, dtype=torch.bool), hard_negative_quantiles(0, 0, 2)[:, 0])
    assert not chosen.requires_grad
