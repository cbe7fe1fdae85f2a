"""Histograms whose bins fit the numbers, and the round numbers to write under them."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 48
"""At most; one a column of a terminal."""
SPREAD = 8
"""Where the largest value is so many times the median, equal bins would show one bar and a long empty tail."""
REACH = 2.5
"""An axis is made so many times longer, at most, to have a mark on it."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values lie in [`edges[i]`, `edges[i + 1]`); the bins are equal on a linear or logarithmic axis."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    logarithmic: bool

    @property
    def total(self) -> int:
        return sum(self.counts)

    def place(self, value: float) -> float:
        """Where a value lies on the axis: 0 at its start, 1 at its end, outside of these beyond them."""
        low, high, at = (self._scaled(x) for x in (self.edges[0], self.edges[-1], value))
        return (at - low) / (high - low)

    def bin(self, value: float) -> int:
        """The bin of a value; that before the first or after the last one, where it is in none."""
        return int(np.searchsorted(self.edges, value, side="right")) - 1

    def ticks(self, most: int) -> list[float]:
        """At most so many round numbers on the axis."""
        low, high = self.edges[0], self.edges[-1]
        if self.logarithmic:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                found = [float(factor * 10**decade) for decade in decades for factor in factors]
                found = [tick for tick in found if low <= tick <= high]
                if len(found) <= most:
                    return found
            return found[:: -(-len(found) // most)]
        step = _round_up((high - low) / most)
        if all(edge.is_integer() for edge in self.edges):  # of counts, which have no fractions
            step = max(step, 1.0)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-9)) if self.logarithmic else value


def of_counts(values: npt.NDArray[np.integer], mark: int | None = None) -> Histogram:
    """Whole numbers from 1, such as lengths in tokens. The axis reaches to `mark` where that is not far."""
    low, high, median = int(values.min()), int(values.max()), float(np.median(values))
    if mark is not None and high < mark <= REACH * high:
        high = mark
    if mark is not None and low / REACH <= mark < low:
        low = mark
    if high > SPREAD * median and high - low > BINS:
        edges = np.unique(np.geomspace(max(low, 1), high + 1, BINS + 1).round())
        return _histogram(values, edges, logarithmic=True)
    low = 0 if low < high / 4 else low
    width = max(1, int(_round_up((high + 1 - low) / BINS)))
    first = low // width
    return _histogram(values, np.arange(first, high // width + 2) * width, logarithmic=False)


def of_shares(values: npt.NDArray[np.floating], bins: int = 20) -> Histogram:
    """Shares from 0 to 1, both included; the last bin has those of 1."""
    edges = np.linspace(0, 1, bins + 1)
    return _histogram(values.clip(0, 1), edges, logarithmic=False)


def _histogram(values: npt.NDArray[np.number], edges: npt.NDArray[np.number], logarithmic: bool) -> Histogram:
    counts, _ = np.histogram(values, edges)
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)), logarithmic)


def _round_up(step: float) -> float:
    """The next of …, 1, 2, 5, 10, 20, 50, …"""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


PERCENTILES = (5, 25, 50, 75, 95, 99)


def percentiles(values: npt.NDArray[np.number]) -> dict[str, float]:
    """min, p5 … p99, max and mean; each but the mean is one of the values."""
    found: dict[str, float] = {"min": values.min().item()}
    for percent in PERCENTILES:
        found[f"p{percent}"] = np.percentile(values, percent, method="nearest").item()
    return {**found, "max": values.max().item(), "mean": float(values.mean())}
