"""Say how far a figure may be off because so few samples were tested: 95 % confidence intervals."""

import math
from collections.abc import Callable

import numpy as np

Z = 1.959963984540054
"""Of a two-sided interval of 95 % under the normal distribution."""
RESAMPLES = 1000
"""How often a bootstrap draws the test set anew."""

Interval = tuple[float, float]


def wilson(hits: float, count: int) -> Interval:
    """Compute Wilson's score interval of a fraction of ``count`` independent samples."""
    if count == 0:
        return 0.0, 1.0
    fraction, square = hits / count, Z * Z / count
    centre = (fraction + square / 2) / (1 + square)
    half = Z * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, resamples: int = RESAMPLES) -> Interval:
    """Compute the percentile interval of a figure over test sets that are drawn anew, always the same draws.

    Args:
        statistic: the figure of the samples whose numbers, int64 [count] with repetitions, it is given.
    """
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def of_mean(values: np.ndarray) -> Interval:
    """Compute the interval of the mean of a few independent draws, under the normal distribution."""
    mean = float(values.mean())
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean - half, mean + half
