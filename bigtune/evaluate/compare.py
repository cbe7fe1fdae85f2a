"""How sure a score is, and whether two models differ: intervals and tests over rows.

The rows of a test set are taken for a sample of all that could be asked. Resampling them shows how far a mean would
move (Efron & Tibshirani 1993; for scores of language models Koehn 2004, https://aclanthology.org/W04-3250).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 2**22  # numbers drawn at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and between what it lies with probability `LEVEL` if other rows like these were asked."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference(Interval):
    """Of two models on the same rows: of (second - first), and how often a mean as far from 0 would come by chance
    alone, if nobody knew which of a row's two scores is whose."""

    p_value: float


def interval(scores: ArrayLike, weights: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Bootstrap over rows, by percentiles; of a weighted mean (a loss by token) where weights are given."""
    values = np.asarray(scores, dtype=np.float64)
    weight = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(_weighted(values, weight))
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (values, weight), _weighted, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=LEVEL,
        batch=_batch(len(values)), method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high))


def difference(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None, seed: int = 0) -> Difference:
    """Compare two models row by row, which takes out how hard each row is.

    Args:
        first, second: scores of the same rows, in the same order.
    """
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    weight = np.ones_like(gaps) if weights is None else np.asarray(weights, dtype=np.float64)
    found = interval(gaps, weight, seed)
    if not gaps.any() or len(gaps) == 1:
        return Difference(found.mean, found.low, found.high, 1.0)
    tested = stats.permutation_test(
        (gaps * weight / weight.sum(),), np.sum, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=_batch(len(gaps)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Difference(found.mean, found.low, found.high, float(tested.pvalue))


def _weighted(values: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
    return (values * weight).sum(axis) / weight.sum(axis)  # type: ignore[no-any-return]


def _batch(rows: int) -> int:
    return max(1, _AT_ONCE // rows)
