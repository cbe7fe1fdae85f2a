"""The largest micro batch that fits: doubled until one does not, then halved in between.

Where a try that fails may take the whole host with it, as on a CPU, what it would need is predicted first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """What a run took on all its ranks: the peak, and of it what was kept for the backward pass."""

    peak_gib: float
    activations_gib: float


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, where all smaller ones do; 0 where none does."""
    good, bad = 0, most + 1
    while good + 1 < bad:
        trial = min(max(1, 2 * good), most) if bad > most else (good + bad) // 2
        if fits(trial):
            good = trial
        else:
            bad = trial
    return good


def predicted_gib(measured: Mapping[int, Need], micro_batch: int) -> float | None:
    """What a micro batch would take on all ranks; None where no smaller one was measured.

    It is on the line through the two largest that were. Of one alone, what it kept for the backward pass grows and the
    rest stays: less than will be needed, so that nothing is refused that might fit.
    """
    smaller = sorted(size for size in measured if size < micro_batch)
    if not smaller:
        return None
    last = smaller[-1]
    slope = measured[last].activations_gib / last
    if len(smaller) > 1:
        before = smaller[-2]
        slope = max(0.0, (measured[last].peak_gib - measured[before].peak_gib) / (last - before))
    return measured[last].peak_gib + slope * (micro_batch - last)
