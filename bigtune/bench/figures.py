"""What a run's metrics.jsonl says of its speed.

steps 1 … w | w + 1 … n      the first w are left out
            ▲ the clock runs from here to the end of step n, whatever happens in between
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

PHASES = ("data", "forward", "backward", "reduce", "optimizer", "other")
"""In the order that a step has them, as far as they are known; `other` is what no timer saw."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One measured case. A device is a rank's: its GPU, or its cores.

    `steps` has the seconds, tokens and supervised tokens of each step after the warm-up, which the rest is made of.
    Phases and memory are rank 0's.
    """

    tokens_per_second: float
    supervised_tokens_per_second: float
    tokens_per_second_a_device: float
    supervised_tokens_per_second_a_device: float
    step_seconds: Mapping[str, float]  # median, p10, p90: between the ends of two steps
    phases: Mapping[str, Mapping[str, float]]  # median_seconds, and share of all the steps' time
    rank_imbalance: float | None  # of the slowest rank's own seconds to the median rank's; None of one rank
    peak_memory_gib: float  # of rank 0's GPU, or process
    memory_gib: Mapping[str, float]  # by kind, after the first step
    first_step_seconds: float | None  # from the command to the end of the first step
    steps: Mapping[str, Sequence[float]]

    @classmethod
    def of(
        cls, lines: Sequence[Mapping[str, Any]], warm_up: int, ranks: int, first_step_seconds: float | None = None
    ) -> Self:
        """Of the lines of metrics.jsonl, of which `warm_up` are left out: one at least, and all but two at most."""
        after, ends = lines[warm_up:], [line["time"] for line in lines[warm_up - 1 :]]
        seconds = [end - begin for begin, end in pairwise(ends)]
        tokens, supervised = ([line[key] for line in after] for key in ("tokens", "supervised_tokens"))
        whole = ends[-1] - ends[0]
        low, high = np.percentile(seconds, (10, 90))
        return cls(
            tokens_per_second=sum(tokens) / whole,
            supervised_tokens_per_second=sum(supervised) / whole,
            tokens_per_second_a_device=sum(tokens) / whole / ranks,
            supervised_tokens_per_second_a_device=sum(supervised) / whole / ranks,
            step_seconds={"median": statistics.median(seconds), "p10": float(low), "p90": float(high)},
            phases=phases_of(after, seconds),
            rank_imbalance=_imbalance(after) if ranks > 1 else None,
            peak_memory_gib=max(line["peak_memory_gib"] for line in lines),
            memory_gib=lines[0].get("memory_gib", {}),
            first_step_seconds=first_step_seconds,
            steps={"seconds": [round(each, 6) for each in seconds], "tokens": tokens, "supervised_tokens": supervised},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self)


def phases_of(lines: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> dict[str, dict[str, float]]:
    """Where the time of steps goes, by phase.

    Where the run has timed no phases, what the ranks waited for data is all that is known. The shares add up to 1
    where it has: timers of a GPU and of its host differ a little, so that the parts may come to more than the whole,
    which then counts as their sum.

    Args:
        seconds: of each step, between the end of the one before and its own.
    """
    parts: dict[str, list[float]] = {"data": [line["data_seconds"] for line in lines]}
    timed = [line.get("phase_seconds") for line in lines]
    for name in dict.fromkeys(name for phases in timed for name in phases or ()):
        parts[name] = [(phases or {}).get(name, 0.0) for phases in timed]
    known = [sum(of_step) for of_step in zip(*parts.values(), strict=True)]
    if any(timed):
        parts["other"] = [max(0.0, whole - part) for whole, part in zip(seconds, known, strict=True)]
    total = max(sum(seconds), sum(map(sum, parts.values())))
    order = [name for name in PHASES if name in parts] + [name for name in parts if name not in PHASES]
    return {
        name: {"median_seconds": statistics.median(parts[name]), "share": sum(parts[name]) / total} for name in order
    }


def _imbalance(lines: Sequence[Mapping[str, Any]]) -> float | None:
    spreads = [line["rank_seconds"] for line in lines if line.get("rank_seconds")]
    ratios = [spread["most"] / spread["median"] for spread in spreads if spread["median"]]
    return statistics.median(ratios) if ratios else None
