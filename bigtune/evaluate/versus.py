"""Two models on the same rows, base against tuned: what changed, how surely, and the rows where it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bigtune.errors import DataError
from bigtune.evaluate.compare import Difference, Interval, difference, interval
from bigtune.evaluate.report import Report, Sample, grouped, task_of
from bigtune.plain import plain

Pair = tuple[Sample, Sample]


@dataclass(frozen=True, slots=True)
class Change:
    """One number of both models, and what lies between them, row by row."""

    rows: int
    base: Interval
    tuned: Interval
    difference: Difference


@dataclass(frozen=True, slots=True)
class Versus:
    """Changes by task, by tag and over all rows, each by name: the held-out loss, then the metrics. A difference of
    losses weighs a row by its tokens as the tuned model was asked it, each model's own loss by its own.

    `unpaired` counts rows that only one of the models was asked, as where the other's context is shorter.
    """

    base: str
    tuned: str
    asked: tuple[str, str]
    unpaired: int
    overall: Mapping[str, Change]
    by_task: Mapping[str, Mapping[str, Change]]
    by_tag: Mapping[str, Mapping[str, Change]]
    pairs: tuple[Pair, ...]

    @property
    def main(self) -> str:
        """The metric that counts first."""
        return next(name for name in self.overall if name != LOSS)

    def where_they_differ(self) -> list[Pair]:
        """The rows that one of both answers better, those that the tuned one gained first."""
        gaps = [(after.scores[self.main] or 0.0) - (before.scores[self.main] or 0.0) for before, after in self.pairs]
        return [self.pairs[at] for at in sorted(range(len(gaps)), key=lambda at: -gaps[at]) if gaps[at]]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        found: dict[str, Any] = plain(asdict(self))
        return found


LOSS = "held_out_loss"


def versus(base: Report, tuned: Report) -> Versus:
    """Pair the rows of two reports.

    Raises:
        DataError: they have no row in common.
    """
    known = {(sample.where, sample.question): sample for sample in base.samples}
    pairs = [(known[key], sample) for sample in tuned.samples if (key := (sample.where, sample.question)) in known]
    if not pairs:
        raise DataError("the two models were asked no row in common")
    by_task, by_tag = grouped(pairs, lambda pair: task_of(pair[1])), grouped(pairs, lambda pair: pair[1].tags)
    unpaired = len(base.samples) + len(tuned.samples) - 2 * len(pairs)
    return Versus(
        base.model, tuned.model, (base.asked(), tuned.asked()), unpaired, _changes(pairs, tuned.seed),
        {name: _changes(some, tuned.seed) for name, some in by_task.items()},
        {name: _changes(some, tuned.seed) for name, some in by_tag.items()},
        tuple(pairs),
    )  # fmt: skip


def _changes(pairs: Sequence[Pair], seed: int) -> dict[str, Change]:
    olds, news = [before for before, _ in pairs], [after for _, after in pairs]
    tokens = [sample.answer_tokens for sample in news]
    old, new = ([sample.held_out_loss for sample in samples] for samples in (olds, news))
    found = {
        LOSS: Change(
            len(pairs), interval(old, [sample.answer_tokens for sample in olds], seed), interval(new, tokens, seed),
            difference(old, new, tokens, seed),
        )
    }  # fmt: skip
    for name in news[0].scores:
        scores = [(before.scores.get(name), after.scores[name]) for before, after in pairs]
        both = [(before, after) for before, after in scores if before is not None and after is not None]
        if both:
            old, new = ([pair[side] for pair in both] for side in (0, 1))
            change = difference(old, new, seed=seed)
            found[name] = Change(len(both), interval(old, seed=seed), interval(new, seed=seed), change)
    return found
