"""An inspection in a terminal: tables, histograms of block characters, and token text in colour.

Supervised tokens are green, special ones reversed, and every second one is underlined, so that borders show. Without
colours ⟦brackets⟧ stand around what is supervised, and dots between the tokens of a word.
"""

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bigtune.report.blocks import COLOURS, Plot, RowBar
from bigtune.report.inspection import Inspection, Loss, PackedRow, Packing, Sample, SourceShare
from bigtune.report.tokens import Gap, Token, shorten
from bigtune.report.words import cuts_told, imbalance_told, row_told, steps_told
from bigtune.visible import visible

SAMPLE_TOKENS, PART_TOKENS = 400, 40
"""Of a sample, and of a document in a packed row, so many are shown."""
PARTS = 12
"""Documents of a packed row that are shown."""
NUMBERS_WIDTH = 56
"""Columns that the numbers of a source take."""
SUPERVISED, OTHER, SPECIAL, WEIGHT, TROUBLE = "bold green", "dim", "reverse", "yellow", "bold red"


def render(inspection: Inspection, width: int) -> RenderableType:
    """All of an inspection, for a console of so many columns."""
    return Group(*_parts(inspection, width))


def _parts(inspection: Inspection, width: int) -> Iterator[RenderableType]:
    if inspection.refusal:
        yield Text.assemble((" Training would refuse this run ", "bold white on red"))
        yield Text(inspection.refusal, TROUBLE)
    yield from _heading("Where the documents come from")
    yield _facts(
        {
            "model": inspection.model,
            "chat template": inspection.template,
            "shown": inspection.scope + (" (data.stream: true)" if inspection.streamed else ""),
        }
    )
    yield ""
    yield _sources(inspection, max(16, width - NUMBERS_WIDTH))
    for note in inspection.notes:
        yield Text(f"· {note}")
    yield from _heading("What is left out")
    yield _losses(inspection)
    yield from _heading("Statistics")
    yield from _statistics(inspection)
    if inspection.samples:
        yield from _heading("Sample documents")
        yield _Legend()
    for number, sample in enumerate(inspection.samples, 1):
        yield from _sample(f"sample {number}", sample, SAMPLE_TOKENS)
    for row in inspection.rows:
        yield from _heading(f"Packed row {row.number}")
        yield from _row(row)


def _heading(title: str) -> Iterator[RenderableType]:
    yield ""
    yield Rule(f"[bold]{escape(title)}[/]", align="left", style="dim")


def _facts(facts: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, escape(value))
    return grid


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _sources(inspection: Inspection, room: int) -> Table:
    sources = inspection.sources
    unused = {
        "pieces": all(source.pieces == source.documents for source in sources),
        "asked": all(source.asked_share is None for source in sources),
    }
    table = _table(*(column for column in _cells(inspection.total, room) if not unused.get(column)))
    for source in sources:
        table.add_row(*(cell for column, cell in _cells(source, room).items() if not unused.get(column)))
    if len(sources) > 1:
        total = _cells(inspection.total, room)
        table.add_row(*(cell for column, cell in total.items() if not unused.get(column)), style="bold")
    return table


def _cells(source: SourceShare, room: int) -> dict[str, str]:
    return {
        "source": escape(visible(_ending(source.name, room))),
        "rows": _count(source.rows),
        "documents": _count(source.documents),
        "pieces": _count(source.pieces),
        "tokens": _count(source.tokens),
        "asked": "" if source.asked_share is None else f"{source.asked_share:.1%}",
        "share": f"{source.tokens_share:.1%}",
        "supervised": f"{source.supervised_share:.1%}",
    }


def _ending(name: str, room: int) -> str:
    """A name whose beginning is left out where it is long: the ends of paths tell them apart."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _count(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _losses(inspection: Inspection) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", no_wrap=True, style="yellow")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for loss in inspection.losses:
        grid.add_row(f"{loss.count:,}", loss.unit, _reason(loss))
    for count, told in cuts_told(inspection):
        grid.add_row(f"{count:,}", "documents", told)
    return grid if grid.row_count else Text("nothing", "green")


def _reason(loss: Loss) -> Text:
    text = Text(loss.reason, "bold")
    for example in loss.examples:
        text.append(f"\n{visible(example.where)}", "default not bold")
        if example.told:
            text.append(f": {visible(example.told)}", "dim not bold")
        if example.like:
            text.append(f" repeats {visible(example.like)}", "dim not bold")
    return text


def _statistics(inspection: Inspection) -> Iterator[RenderableType]:
    if inspection.packing:
        yield _packing(inspection.packing)
    if inspection.lengths and inspection.length_percentiles:
        yield ""
        yield Text("tokens a document" + ("" if inspection.streamed else ", before long ones are cut"), "bold")
        yield Plot(inspection.lengths, inspection.sequence_length, "{:,.0f}")
        yield _percentiles(inspection.length_percentiles, "{:,.0f}")
    if inspection.supervised_shares and inspection.supervised_percentiles:
        yield ""
        yield Text("supervised share of a document", "bold")
        yield Plot(inspection.supervised_shares, None, "{:.0%}")
        yield _percentiles(inspection.supervised_percentiles, "{:.0%}")


def _packing(packing: Packing) -> Table:
    return _facts(
        {
            "packed rows": f"{packing.rows:,} of {packing.sequence_length:,} tokens, {packing.efficiency:.2%} full, "
            f"{packing.pieces_per_row:.1f} documents a row",
            "steps": steps_told(packing),
            "worst imbalance": imbalance_told(packing),
        }
    )


def _percentiles(values: dict[str, float], form: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in values:
        grid.add_column(justify="right", no_wrap=True)
    grid.add_row(*(Text(name, "dim") for name in values))
    grid.add_row(*(form.format(value) for value in values.values()))
    return grid


class _Legend:
    """How token text is marked."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console.color_system is None:
            yield Text("⟦supervised⟧  a dot where a token ends inside a word  ↵ line break")
            return
        words = [("supervised", SUPERVISED), ("not supervised", OTHER), ("special token", f"{OTHER} {SPECIAL}")]
        line = Text()
        for word, style in words:
            line.append(word, style)
            line.append("  ")
        line.append("every second token", f"{OTHER} underline")
        line.append("  ↵ line break", OTHER)
        yield line


def _sample(name: str, sample: Sample, most: int) -> Iterator[RenderableType]:
    title = Text.assemble((name, "bold"), f" · {visible(sample.where)} · ")
    yield ""
    yield title.append_text(_about(sample))
    yield Padding(_TokenText(sample.tokens, most), (0, 0, 0, 2))


def _about(sample: Sample) -> Text:
    share = sample.supervised / max(sample.length, 1)
    text = Text(f"{sample.length:,} tokens, {sample.supervised:,} supervised ({share:.0%})", "dim")
    return text.append(f" · {sample.note}", f"not dim {WEIGHT}") if sample.note else text


class _TokenText:
    """The text of some tokens; a long one is cut in its middle."""

    def __init__(self, tokens: Sequence[Token], most: int) -> None:
        self._parts = shorten(tokens, most)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = console.color_system is None
        head, gap, tail = self._parts
        text = _marked(head, plain, 0)
        if gap:
            text.append(f"\n… {_gap(gap)} …\n", "italic yellow")
            text.append_text(_marked(tail, plain, len(head)))
        if text.plain.endswith("\n"):
            text.right_crop()
        yield text


def _gap(gap: Gap) -> str:
    return f"{gap.count:,} tokens, {gap.supervised:,} of them supervised, are not shown"


def _marked(tokens: Sequence[Token], plain: bool, first: int) -> Text:
    text = Text(overflow="fold")
    before = 0.0
    for number, token in enumerate(tokens, first):
        said = visible(token.text)
        if plain:
            inside = number > first and not text.plain[-1:].isspace() and not said[:1].isspace()
            text.append("⟧" * (before > 0 and not token.supervised) + "·" * inside)
            text.append("⟦" * (token.supervised and not before))
        if token.weight != before and token.weight not in (0, 1):
            text.append(f"×{token.weight:g} ", WEIGHT)
        before = token.weight
        style = SUPERVISED if token.supervised else OTHER
        text.append(said, f"{style} {SPECIAL if token.special else 'underline' if number % 2 else ''}")
    if plain and before > 0:
        text.append("⟧")
    return text


def _row(row: PackedRow) -> Iterator[RenderableType]:
    yield Text(row_told(row), OTHER)
    yield RowBar(row)
    begin = 0
    for number, document in enumerate(row.documents[:PARTS], 1):
        end = begin + document.length
        style = COLOURS[number % 2]
        yield ""
        yield Rule(Text(f"{number} · tokens {begin:,} to {end - 1:,}", style), align="left", style=style)
        yield Text(f"{visible(document.where)} · " if document.where else "").append_text(_about(document))
        yield Padding(_TokenText(document.tokens, PART_TOKENS), (0, 0, 0, 2))
        begin = end
    more = row.documents[PARTS:]
    if more:
        yield ""
        yield Text(f"… {len(more):,} more documents of {sum(document.length for document in more):,} tokens", "yellow")
    yield Rule(style="dim")
