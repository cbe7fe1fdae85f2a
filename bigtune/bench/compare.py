"""What changed between two benchmarks, with the noise in view.

Speed is tokens over seconds of the measured steps. How far the quotient of two speeds may be off is told by a bootstrap
(Efron, 1979): the steps of either case are drawn again, with repetition, and the middle 95% of the quotients are the
interval. It sees the noise from step to step, not that from run to run: what slows a whole run, as a neighbour on the
same host does, stays in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bigtune.bench.result import BUSY, Result

DRAWS, SEED = 4000, 0
INTERVAL = (2.5, 97.5)
"""Percentiles."""
Verdict = Literal["faster", "slower", "no difference beyond the noise"]
FASTER: Verdict = "faster"
SLOWER: Verdict = "slower"
SAME: Verdict = "no difference beyond the noise"


@dataclass(frozen=True, slots=True)
class Change:
    """A case that both measured. `ratio` is of tokens a second, after over before, `low` and `high` its interval."""

    case: str
    before_tokens_per_second: float
    after_tokens_per_second: float
    ratio: float
    low: float
    high: float
    verdict: Verdict
    before_micro_batch: int | None
    after_micro_batch: int | None
    before_peak_memory_gib: float
    after_peak_memory_gib: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that two benchmarks did not have alike."""

    what: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two benchmarks side by side."""

    changes: tuple[Change, ...]
    unmeasured: Mapping[str, Mapping[str, str]]  # case: why `before` or `after` has no figures
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    machine: tuple[Difference, ...]
    run_file: tuple[Difference, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self)


def compare(before: Mapping[str, Result], after: Mapping[str, Result]) -> Comparison:
    """Compare the cases of two benchmarks that have the same settings.

    Args:
        before: results by their key, as `read_results` has them.
    """
    both = [key for key in before if key in after]
    unmeasured = {}
    for key in both:
        reasons = {"before": before[key].reason, "after": after[key].reason}
        if any(reasons.values()):
            unmeasured[key] = {side: reason for side, reason in reasons.items() if reason}
    pairs = [(before[key], after[key]) for key in both]
    machine = _differences([(a.machine, b.machine) for a, b in pairs])
    return Comparison(
        changes=tuple(_change(before[key], after[key]) for key in both if key not in unmeasured),
        unmeasured=unmeasured,
        only_before=tuple(key for key in before if key not in after),
        only_after=tuple(key for key in after if key not in before),
        machine=machine,
        run_file=_differences([(_settings(a), _settings(b)) for a, b in pairs if a.run and b.run]),
        warnings=tuple(_warnings(pairs, machine)),
    )


def _change(before: Result, after: Result) -> Change:
    assert before.figures and after.figures
    ratio, low, high = ratio_of(before.figures.steps, after.figures.steps)
    verdict = FASTER if low > 1 else SLOWER if high < 1 else SAME
    return Change(
        case=before.key,
        before_tokens_per_second=before.figures.tokens_per_second,
        after_tokens_per_second=after.figures.tokens_per_second,
        ratio=ratio,
        low=low,
        high=high,
        verdict=verdict,
        before_micro_batch=before.micro_batch,
        after_micro_batch=after.micro_batch,
        before_peak_memory_gib=before.figures.peak_memory_gib,
        after_peak_memory_gib=after.figures.peak_memory_gib,
    )


def ratio_of(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """The quotient of two speeds, and the bounds of its 95% interval.

    Args:
        before: `tokens` and `seconds` of each step.
    """
    random = np.random.default_rng(SEED)
    drawn = _speeds(after, random) / _speeds(before, random)
    low, high = np.percentile(drawn, INTERVAL)
    whole = [sum(steps["tokens"]) / sum(steps["seconds"]) for steps in (before, after)]
    return whole[1] / whole[0], float(low), float(high)


def _speeds(steps: Mapping[str, Sequence[float]], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Of steps drawn again and again: [DRAWS]."""
    count = len(steps["seconds"])
    drawn = random.integers(count, size=(DRAWS, count))
    tokens, seconds = (np.asarray(steps[key], np.float64)[drawn].sum(1) for key in ("tokens", "seconds"))
    quotients: npt.NDArray[np.float64] = tokens / seconds
    return quotients


def _settings(result: Result) -> dict[str, Any]:
    """The run file's keys and values, without those of the case and without places."""
    left_out = ("output", "data.store", *result.case.settings)
    return {
        key: value
        for key, value in _flat(result.run)
        if not any(key == other or key.startswith(f"{other}.") for other in left_out)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _differences(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[Difference, ...]:
    """What differs in any pair, each thing once."""
    found = dict[str, Difference]()
    for before, after in pairs:
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                found.setdefault(key, Difference(key, before.get(key), after.get(key)))
    return tuple(found.values())


def _warnings(pairs: Sequence[tuple[Result, Result]], machine: Sequence[Difference]) -> list[str]:
    hardware = {"cpu", "cores", "cpu_bfloat16", "memory_gib", "gpu", "gpus"}
    warnings = []
    if any(difference.what in hardware for difference in machine):
        warnings.append("the machines differ: a difference in speed may be theirs")
    busy = [key for key, of in (("before", 0), ("after", 1)) if any((p[of].busy_by_others or 0) > BUSY for p in pairs)]
    if busy:
        warnings.append(f"other processes kept the machine busy ({' and '.join(busy)}): measure again on a quiet one")
    if not pairs:
        warnings.append("no case has the same settings in both")
    return warnings
