"""Reports as tables for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bigtune.evaluate.compare import LEVEL, Interval
from bigtune.evaluate.report import Report, Score
from bigtune.evaluate.versus import LOSS, Change, Versus
from bigtune.visible import visible

SHOWN = 3
"""Rows that two models answer differently."""


def render(report: Report) -> Table:
    """One model's scores: by task, by tag, and over all rows."""
    names = list(report.overall.metrics)
    table = _table(f"{report.model} ({report.asked()})", names, report.left_out())
    for group in (report.by_task, report.by_tag, {"all rows": report.overall}):
        for name, score in group.items():
            table.add_row(escape(name), str(score.rows), *_cells(score, names))
        table.add_section()
    return table


def render_shots(reports: Sequence[Report]) -> Table:
    """One model's scores over all rows, by the number of examples before each question."""
    names = list(reports[0].overall.metrics)
    table = _table(reports[0].model, names, reports[-1].left_out(), first="examples")
    for report in reports:
        table.add_row(str(report.shots), str(report.overall.rows), *_cells(report.overall, names))
    return table


def render_versus(found: Versus) -> Group:
    """Two models, with what lies between them and the chance that they are alike; then rows that they answer
    differently."""
    base, tuned = found.asked
    title = f"base: {found.base} ({base})\ntuned: {found.tuned} ({tuned})"
    caption = f"difference: between what it lies ({LEVEL:.0%}); p: as far apart by chance alone"
    if found.unpaired:
        caption += f"\nleft out: {found.unpaired} rows that only one model was asked"
    table = Table(title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column, justify in (
        ("task", "left"), ("score", "left"), ("rows", "right"), ("base", "right"), ("tuned", "right"),
        ("difference", "right"), ("p", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for group in (found.by_task, found.by_tag, {"all rows": found.overall}):
        for task, changes in group.items():
            shown = task
            for name, change in changes.items():
                table.add_row(escape(shown), _title(name), str(change.rows), *_changed(name, change))
                shown = ""
        table.add_section()
    return Group(table, *_differing(found))


def _table(title: str, metrics: Sequence[str], caption: str | None, first: str = "task") -> Table:
    caption_text = Text(caption) if caption else None
    table = Table(title=Text(title), caption=caption_text, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    for column in ("rows", "held-out loss", *(name.replace("_", " ") for name in metrics)):
        table.add_column(column, justify="right")
    return table


def _cells(score: Score, names: Sequence[str]) -> list[str]:
    found = [score.metrics.get(name) for name in names]
    return [f"{score.held_out_loss.mean:.3f}", *(_percent(one) if one else "–" for one in found)]


def _percent(one: Interval) -> str:
    return f"{one.mean:.1%} ± {(one.high - one.low) / 2:.1%}"


def _title(name: str) -> str:
    return "held-out loss" if name == LOSS else name.replace("_", " ")


def _changed(name: str, change: Change) -> list[str]:
    """Both models' means, the difference and how sure it is."""
    form, signed = (".3f", "+.3f") if name == LOSS else (".1%", "+.1%")
    gap = change.difference
    between = f"{gap.low:{signed}} to {gap.high:{signed}}"
    p_value = f"{gap.p_value:.3f}" if gap.p_value >= 0.001 else "<0.001"
    return [f"{change.base.mean:{form}}", f"{change.tuned.mean:{form}}", between, p_value]


def _differing(found: Versus) -> list[Text]:
    """The rows that one of both answers better: the most gained, then the most lost."""
    differing = found.where_they_differ()
    chosen = differing if len(differing) <= 2 * SHOWN else [*differing[:SHOWN], *differing[-SHOWN:]]
    lines = []
    for before, after in chosen:
        old, new = before.scores[found.main] or 0.0, after.scores[found.main] or 0.0
        text = Text(f"\n{after.where}: {found.main.replace('_', ' ')} {old:.2f} → {new:.2f}\n", style="bold")
        for title, said in (
            ("asked", after.question), ("reference", after.reference), ("base", before.output), ("tuned", after.output),
        ):  # fmt: skip
            text.append(f"{title}: ", style="dim")
            text.append(f"{_short(said)}\n", style="not bold")
        lines.append(text)
    return lines


def _short(said: str, most: int = 300) -> str:
    line = visible(" ".join(said.split()))
    return line if len(line) <= most else f"{line[:most]} …"
