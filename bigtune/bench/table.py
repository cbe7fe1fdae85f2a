"""The results of a benchmark in a terminal: a few tables, and what to know of how they came about."""

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bigtune.bench.compare import FASTER, SLOWER, Comparison, Difference
from bigtune.bench.figures import PHASES, Figures
from bigtune.bench.result import Result
from bigtune.bench.words import caveats, hardware_told, settings_told

TROUBLE = "red"


def render(results: Sequence[Result]) -> RenderableType:
    """Everything that was found, by case."""
    return Group(*_parts(results))


def _parts(results: Sequence[Result]) -> Iterator[RenderableType]:
    measured = [(number, result, result.figures) for number, result in enumerate(results, 1) if result.figures]
    yield _heading("Cases")
    yield _cases(results)
    if measured:
        yield _heading("Throughput")
        yield _throughput(measured)
        yield _heading("Where the time of a step goes, on rank 0")
        yield _phases(measured)
        yield _heading("Model FLOP utilization")
        yield _operations(measured)
        yield _heading("Memory of rank 0 (GiB)")
        yield _memory(measured)
    yield ""
    for line in [*hardware_told(results), *caveats(results)]:
        yield Text(line, "yellow" if line.startswith("warning") else "dim")


def _heading(title: str) -> RenderableType:
    return Group("", Rule(f"[bold]{escape(title)}[/]", align="left", style="dim"))


def _table(*columns: str, words: Sequence[str] = ()) -> Table:
    """Of numbers, but for some columns of words."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        if column in words:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _cases(results: Sequence[Result]) -> Table:
    table = _table("", "case", "ranks", "tokens/s", words=("case", "tokens/s"))
    for number, result in enumerate(results, 1):
        found = result.figures
        told = Text(f"{found.tokens_per_second:,.0f}") if found else Text(result.reason, TROUBLE)
        table.add_row(str(number), Text(settings_told(result)), str(result.case.ranks), told)
    return table


def _throughput(measured: Sequence[tuple[int, Result, Figures]]) -> Table:
    table = _table(
        "", "tokens/s\nin all", "\na device", "supervised\ntokens/s", "step (s)\nmedian", "\np10", "\np90", "\nscaling"
    )
    for number, result, figures in measured:
        speeds = (
            figures.tokens_per_second, figures.tokens_per_second_a_device, figures.supervised_tokens_per_second
        )  # fmt: skip
        step = [f"{figures.step_seconds[name]:.3f}" for name in ("median", "p10", "p90")]
        scaling = "" if result.scaling_efficiency is None else f"{result.scaling_efficiency:.0%}"
        table.add_row(str(number), *(f"{speed:,.0f}" for speed in speeds), *step, scaling)
    return table


def _phases(measured: Sequence[tuple[int, Result, Figures]]) -> Table:
    seen = dict.fromkeys(name for _, _, figures in measured for name in figures.phases)
    names = [name for name in PHASES if name in seen] + [name for name in seen if name not in PHASES]
    table = _table("", *(f"\n{name}" for name in names), "first step\nafter (s)")
    for number, _, figures in measured:
        shares = [f"{figures.phases[name]['share']:.1%}" if name in figures.phases else "?" for name in names]
        table.add_row(str(number), *shares, _number(figures.first_step_seconds, "{:.1f}".format))
    return table


def _operations(measured: Sequence[tuple[int, Result, Figures]]) -> Table:
    sheet = any(result.roof_tflops.get("datasheet") for _, result, _ in measured)
    roofs = {"products": "measured"} | ({"sheet": "datasheet"} if sheet else {})
    columns = [f"{name}\nTFLOP/s" for name in ("products", "exact", "PaLM's")]
    for at in (3, 2):
        columns[at:at] = [f"of\n{name}" for name in roofs]
    table = _table("", *columns)
    for number, result, _ in measured:
        cells = [_number(result.roof_tflops.get("measured"), _digits)]
        for formula in ("exact", "palm"):
            cells.append(_number(result.tflops.get(formula), _digits))
            shares = result.mfu.get(formula, {})
            cells += [_number(shares.get(roof), "{:.1%}".format) for roof in roofs.values()]
        table.add_row(str(number), *cells)
    return table


def _memory(measured: Sequence[tuple[int, Result, Figures]]) -> Table:
    kinds = list(dict.fromkeys(kind for _, _, figures in measured for kind in figures.memory_gib))
    table = _table("", "peak", *kinds)
    for number, _, figures in measured:
        cells = [_number(figures.memory_gib.get(kind), _digits) for kind in kinds]
        table.add_row(str(number), _digits(figures.peak_memory_gib), *cells)
    return table


def render_comparison(found: Comparison) -> RenderableType:
    """What changed from one benchmark to another."""
    return Group(*_changes(found))


def _changes(found: Comparison) -> Iterator[RenderableType]:
    yield _heading("Tokens a second, before and after")
    table = _table("", "case", "before", "after", "ratio", "95% interval", "peak (GiB)", words=("case",))
    for number, change in enumerate(found.changes, 1):
        style = {FASTER: "green", SLOWER: "red"}.get(change.verdict, "")
        name = Text(change.case)
        if change.before_micro_batch != change.after_micro_batch:
            name.append(f" · micro_batch {change.before_micro_batch} → {change.after_micro_batch}")
        name.append(f" · {change.verdict}", style)
        table.add_row(
            str(number), name, f"{change.before_tokens_per_second:,.0f}", f"{change.after_tokens_per_second:,.0f}",
            f"{change.ratio:.3f}", f"{change.low:.3f}–{change.high:.3f}",
            f"{_digits(change.before_peak_memory_gib)} → {_digits(change.after_peak_memory_gib)}",
        )  # fmt: skip
    yield table
    for title, lines in _lists(found).items():
        if lines:
            yield _heading(title)
            yield from (Text(line) for line in lines)
    yield ""
    yield from (Text(f"warning: {warning}", "yellow") for warning in found.warnings)


def _lists(found: Comparison) -> dict[str, list[str]]:
    return {
        "Not measured": [
            f"{case}: {side}: {reason}" for case, sides in found.unmeasured.items() for side, reason in sides.items()
        ],
        "Only in one": [f"before: {case}" for case in found.only_before]
        + [f"after: {case}" for case in found.only_after],
        "Machine and versions": _told(found.machine),
        "Run file": _told(found.run_file),
    }


def _told(differences: Sequence[Difference]) -> list[str]:
    return [f"{each.what}: {each.before} → {each.after}" for each in differences]


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "?" if value is None else form(value)


def _digits(value: float) -> str:
    """Three that count."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
