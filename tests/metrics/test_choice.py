"""Scores of choices: the official definitions, ties, and chance."""

import itertools
import math

import pytest

from unimo3.metrics.choice import choice_chance, choice_marks


@pytest.mark.parametrize(
    ("scores", "images", "right"),
    [
        ([0.4, 0.1], (0, None), True),
        ([0.1, 0.4], (0, None), False),
        ([0.1, 0.4, 0.3], (None, 0, None), True),
        ([0.4, 0.4], (0, None), False),
        ([0.4, math.nan], (0, None), False),
        ([math.nan, 0.4], (0, None), False),
        ([0.4, 0.1, math.nan], (0, None, None), False),
    ],
)
def test_one_image_must_score_its_caption_above_every_other(scores, images, right):
    marks, is_tied = choice_marks([scores], images)
    assert marks == {"accuracy": right}
    assert is_tied == (scores == [0.4, 0.4])


def official(c0_i0, c1_i0, c0_i1, c1_i1):
    """Winoground's definitions, of the scores of caption c with image i."""
    text = c0_i0 > c1_i0 and c1_i1 > c0_i1
    image = c0_i0 > c0_i1 and c1_i1 > c1_i0
    return {"text": text, "image": image, "group": text and image}


@pytest.mark.parametrize("swapped", [False, True])
def test_two_images_have_winogrounds_scores_and_the_chance_of_all_orders(swapped):
    totals = dict.fromkeys(("text", "image", "group"), 0)
    orders = list(itertools.permutations(range(4)))
    for c0_i0, c1_i0, c0_i1, c1_i1 in orders:
        expected = official(c0_i0, c1_i0, c0_i1, c1_i1)
        scores = [[c1_i0, c0_i0], [c1_i1, c0_i1]] if swapped else [[c0_i0, c1_i0], [c0_i1, c1_i1]]
        assert choice_marks(scores, (1, 0) if swapped else (0, 1)) == (expected, False)
        for name, right in expected.items():
            totals[name] += right
    assert choice_chance(2, 2) == pytest.approx({name: total / len(orders) for name, total in totals.items()})


def test_any_tie_of_two_images_is_wrong_and_counted():
    for scores in itertools.product(range(2), repeat=4):
        c0_i0, c1_i0, c0_i1, c1_i1 = scores
        marks, is_tied = choice_marks([[c0_i0, c1_i0], [c0_i1, c1_i1]], (0, 1))
        assert marks == official(*scores)
        assert is_tied == (c0_i0 in (c1_i0, c0_i1) or c1_i1 in (c1_i0, c0_i1))


def test_chance_of_one_image_is_one_in_its_captions():
    assert choice_chance(1, 2) == {"accuracy": 0.5}
    assert choice_chance(1, 5) == {"accuracy": 0.2}
