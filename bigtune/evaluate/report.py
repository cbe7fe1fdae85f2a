"""The result of one evaluation, as values, as JSON and as a table."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Sample:
    """One question as asked and answered. `held_out_loss` is the mean over the reference's tokens."""

    question: str
    reference: str
    output: str
    correct: bool
    held_out_loss: float
    answer_tokens: int
    task: str
    tags: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Score:
    """Over some rows: the mean loss of an answer token, and the share of right answers."""

    rows: int
    answer_tokens: int
    held_out_loss: float
    exact_match: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Score":
        """Score one row or more. Every token counts alike, so a long answer weighs more than a short one."""
        tokens = sum(sample.answer_tokens for sample in samples)
        return cls(
            rows=len(samples),
            answer_tokens=tokens,
            held_out_loss=sum(sample.held_out_loss * sample.answer_tokens for sample in samples) / tokens,
            exact_match=sum(sample.correct for sample in samples) / len(samples),
        )


def scores_by(samples: Sequence[Sample], names: Callable[[Sample], Sequence[str]]) -> dict[str, Score]:
    """A score for each name, of the samples that bear it, in the order in which names first appear."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        for name in dict.fromkeys(names(sample)):
            groups.setdefault(name, []).append(sample)
    return {name: Score.of(group) for name, group in groups.items()}


@dataclass(frozen=True, slots=True)
class Report:
    """How one model did.

    Counted here and nowhere else: `rows_unusable` of the sources, skipped because the run file says so, in all and by
    reason, and `rows_too_long` for the model's context.
    """

    model: str
    prompt: str
    shots: int
    answer: str
    seed: int
    device: str
    dtype: str
    seconds: float
    generated_tokens_per_second: float
    rows_unusable: int
    unusable_by_reason: Mapping[str, int]
    rows_too_long: int
    overall: Score
    by_task: Mapping[str, Score]
    by_tag: Mapping[str, Score]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`; a loss that is no number (a broken model) becomes None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: Report) -> Table:
    """One model's scores: by task, by tag, and over all rows."""
    table = _table(f"{escape(report.model)} ({_asked(report)})", _left_out(report))
    for group in _groups(report):
        for name, score in group.items():
            table.add_row(escape(name), str(score.rows), f"{score.held_out_loss:.3f}", f"{score.exact_match:.1%}")
        table.add_section()
    return table


def render_comparison(base: Report, tuned: Report) -> Table:
    """Two models on the same rows, base → tuned. A group that only one of them has is left out."""
    caption = _left_out(tuned)
    if [sample.where for sample in base.samples] != [sample.where for sample in tuned.samples]:
        caption = "the two models were scored on different rows"
    table = _table(f"base: {_asked(base)}\ntuned: {_asked(tuned)}", caption)
    for before, after in zip(_groups(base), _groups(tuned), strict=True):
        for name, old in before.items():
            new = after.get(name)
            if new is None:
                continue
            table.add_row(
                escape(name),
                str(new.rows),
                f"{old.held_out_loss:.3f} → {new.held_out_loss:.3f}",
                f"{old.exact_match:.1%} → {new.exact_match:.1%}",
            )
        table.add_section()
    return table


def _table(title: str, caption: str | None) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("task")
    for column in ("rows", "held-out loss", "exact match"):
        table.add_column(column, justify="right")
    return table


def _groups(report: Report) -> list[Mapping[str, Score]]:
    return [report.by_task, report.by_tag, {"all rows": report.overall}]


def _asked(report: Report) -> str:
    return f"{report.prompt} prompt, {report.shots} {'example' if report.shots == 1 else 'examples'}"


def _left_out(report: Report) -> str | None:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in report.unusable_by_reason.items())
    counts = {f"unusable ({reasons})": report.rows_unusable, "too long for the model's context": report.rows_too_long}
    said = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    return f"rows left out: {said}" if said else None
