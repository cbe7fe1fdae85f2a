"""The result of one evaluation, as values and as JSON; `table.py` shows it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from bigtune.errors import count_of
from bigtune.evaluate.compare import Interval, interval
from bigtune.plain import plain

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question as asked and answered. `held_out_loss` is the mean over the reference's tokens; a score is None
    where the metric failed on this row."""

    question: str
    reference: str
    output: str
    scores: Mapping[str, float | None]
    held_out_loss: float
    answer_tokens: int
    task: str
    tags: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Score:
    """Over some rows: the mean loss of an answer token, in nats, and the mean of each metric, with intervals."""

    rows: int
    answer_tokens: int
    held_out_loss: Interval
    perplexity: float
    metrics: Mapping[str, Interval]

    @classmethod
    def of(cls, samples: Sequence[Sample], seed: int = 0) -> "Score":
        """Score one row or more. Every token counts alike in the loss: a long answer weighs more than a short one."""
        tokens = [sample.answer_tokens for sample in samples]
        loss = interval([sample.held_out_loss for sample in samples], tokens, seed)
        metrics = {}
        for name in samples[0].scores:
            found = [score for sample in samples if (score := sample.scores[name]) is not None]
            if found:
                metrics[name] = interval(found, seed=seed)
        return cls(len(samples), sum(tokens), loss, _exp(loss.mean), metrics)


def grouped(rows: Sequence[Row], names: Callable[[Row], Sequence[str]]) -> dict[str, list[Row]]:
    """The rows that bear each name, in the order in which names first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        for name in dict.fromkeys(names(row)):
            groups.setdefault(name, []).append(row)
    return groups


def task_of(sample: Sample) -> Sequence[str]:
    """The name of a sample's task, if it has one."""
    return (sample.task,) if sample.task else ()


@dataclass(frozen=True, slots=True)
class Failed:
    """A metric that raised: on how many rows, and the first of them."""

    rows: int
    where: str
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """How one model did.

    Counted here and nowhere else: `rows_unusable` of the sources, skipped because the run file says so, in all and by
    reason, and `rows_too_long` for the model's context. `failed` has the metrics that raised on rows.
    """

    model: str
    prompt: str
    shots: int
    seed: int
    device: str
    dtype: str
    seconds: float
    generated_tokens_per_second: float
    rows_unusable: int
    unusable_by_reason: Mapping[str, int]
    rows_too_long: int
    unstopped: int
    failed: Mapping[str, Failed]
    overall: Score
    by_task: Mapping[str, Score]
    by_tag: Mapping[str, Score]
    samples: tuple[Sample, ...]

    def asked(self) -> str:
        """How, in words."""
        return f"{self.prompt} prompt, {count_of(self.shots, 'example')}"

    def left_out(self) -> str | None:
        """Which rows have no score, and why."""
        reasons = ", ".join(f"{count} × {reason}" for reason, count in self.unusable_by_reason.items())
        counts = {f"unusable ({reasons})": self.rows_unusable, "too long for the model's context": self.rows_too_long}
        said = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
        lines = [f"rows left out: {said}"] if said else []
        if self.unstopped:
            lines.append(f"{self.unstopped} answers did not end within evaluate.max_new_tokens")
        lines += [
            f"{name} failed on {count_of(failed.rows, 'row')}, first {failed.where}: {failed.why}"
            for name, failed in self.failed.items()
        ]
        return "; ".join(lines) or None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`; a loss that is no number (a broken model) becomes None."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
