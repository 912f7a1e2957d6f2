"""Paired tests: values of statistical tables, Holm's correction, and the power of known designs."""

import math

import pytest

from experiments.paired import holm, num_pairs_for, paired, power, t_quantile, two_sided_p


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (5, 2.571), (9, 2.262), (30, 2.042)])
def test_quantiles_are_those_of_tables(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)
    # A table's quantile is rounded, by 0.0005 at most.
    assert two_sided_p(quantile - 5e-4, freedom) >= 0.05 >= two_sided_p(quantile + 5e-4, freedom)


def test_an_interval_that_ends_at_zero_has_p_of_five_percent():
    test = paired([0.01, 0.03, 0.02, 0.06])
    assert test.mean == pytest.approx(0.03)
    assert test.half_width == pytest.approx(3.182 * 0.0216025 / 2, rel=1e-3)
    assert test.effect == pytest.approx(0.03 / 0.0216025, rel=1e-5)
    shifted = paired([value - test.mean + test.half_width for value in (0.01, 0.03, 0.02, 0.06)])
    assert shifted.p == pytest.approx(0.05, abs=1e-9)
    assert paired([-0.01, -0.03, -0.02, -0.06]).p == test.p


def test_one_seed_or_equal_differences_have_no_spread():
    assert paired([0.5]).mean == 0.5
    assert math.isnan(paired([0.5]).p)
    assert paired([0.25, 0.25]) == (0.25, 0.0, 0.0, math.inf)
    assert paired([0.0, 0.0]).p == 1


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx(
        {"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5}
    )
    assert holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


# G*Power 3.1, two-sided t test of the difference of two dependent means.
@pytest.mark.parametrize(
    ("effect", "alpha", "num_pairs", "reached"), [(0.5, 0.05, 34, 0.8078), (0.8, 0.05, 15, 0.8213)]
)
def test_power_is_that_of_the_noncentral_t(effect, alpha, num_pairs, reached):
    assert power(effect, num_pairs, alpha) == pytest.approx(reached, abs=5e-4)
    assert num_pairs_for(effect, 1.0, alpha) == num_pairs
    assert num_pairs_for(effect / 50, 1 / 50, alpha) == num_pairs


def test_without_an_effect_the_power_is_alpha():
    assert power(0.0, 10, 0.05) == pytest.approx(0.05, abs=1e-4)
