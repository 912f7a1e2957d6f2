"""Paired t tests: intervals, effect sizes, Holm's correction, and the number of seeds that a difference needs.

Source: Student's t for paired samples; Holm, Scandinavian Journal of Statistics 6 (1979); the power is that of the
noncentral t distribution; Cohen's d of paired differences.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import mpmath
import torch

MOST_PAIRS = 1000


class Paired(NamedTuple):
    """The differences of two variants, one for each seed.

    Attributes:
        mean: of the differences.
        half_width: of the 95 % interval of the mean; nan for one seed.
        p: two-sided, that there is no difference; nan for one seed.
        effect: the mean in standard deviations of the differences; nan for one seed.
    """

    mean: float
    half_width: float
    p: float
    effect: float


def paired(differences: Sequence[float]) -> Paired:
    """The paired t test of at least one difference."""
    if len(differences) < 2:
        return Paired(mean(differences), math.nan, math.nan, math.nan)
    center, spread, freedom = mean(differences), stdev(differences), len(differences) - 1
    error = spread / math.sqrt(len(differences))
    if error == 0:
        return Paired(center, 0.0, 1.0 if center == 0 else 0.0, 0.0 if center == 0 else math.copysign(math.inf, center))
    return Paired(center, t_quantile(0.975, freedom) * error, two_sided_p(center / error, freedom), center / spread)


def two_sided_p(t: float, freedom: int) -> float:
    """How probable a value of Student's t at least as far from zero is."""
    return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t has this probability, above 0.5."""
    low, high = 0.0, 1.0
    while 1 - two_sided_p(high, freedom) / 2 < probability:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided_p(middle, freedom) / 2 < probability else (low, middle)
    return high


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values that are corrected for their number, by the same names."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for number, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - number) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def power(effect: float, num_pairs: int, alpha: float) -> float:
    """How probably a two-sided paired t test finds a difference.

    Args:
        effect: the true mean difference in standard deviations of the differences.
        num_pairs: at least 2.
        alpha: probability of finding a difference that is not there.
    """
    freedom = num_pairs - 1
    critical, shift = t_quantile(1 - alpha / 2, freedom), effect * math.sqrt(num_pairs)
    # Over the distribution of the estimated standard deviation, a scaled chi.
    spread = torch.linspace(1e-6, 1 + 8 / math.sqrt(freedom), 601, dtype=torch.float64)
    log_density = (freedom - 1) * spread.log() - freedom * spread**2 / 2
    density = (log_density - log_density.max()).exp()
    exceeds = torch.special.ndtr(shift - critical * spread) + torch.special.ndtr(-shift - critical * spread)
    return ((density * exceeds).sum() / density.sum()).item()


def num_pairs_for(difference: float, spread: float, alpha: float, wanted_power: float = 0.8) -> int:
    """The least number of seeds with which a difference is found with `wanted_power`; `MOST_PAIRS` at most.

    Args:
        difference: the true mean difference.
        spread: standard deviation of the differences.
    """
    low, high = 2, MOST_PAIRS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference / spread, middle, alpha) >= wanted_power else (middle + 1, high)
    return low
