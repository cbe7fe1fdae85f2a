"""Plots for a terminal, drawn with block characters in the room that there is."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bigtune.report.histogram import Histogram
from bigtune.report.inspection import PackedRow

PLOT_ROWS = 7
COLOURS = ("cyan", "magenta")
"""Of the documents of a packed row, by turns."""


class Plot:
    """A histogram as columns; those beyond `mark`, the sequence length, are red."""

    def __init__(self, histogram: Histogram, mark: int | None, form: str) -> None:
        self._histogram, self._mark, self._form = histogram, mark, form

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        counts, most = self._histogram.counts, max(self._histogram.counts)
        label = f"{most:,}"
        indent = len(label) + 2
        wide = max(1, min(-(-60 // len(counts)), (options.max_width - indent - 4) // len(counts)))
        beyond = len(counts) if self._mark is None else self._histogram.bin(self._mark)
        eighths = [-(-count * 8 * PLOT_ROWS // most) for count in counts]
        for line in range(PLOT_ROWS, 0, -1):
            text = Text(f"{label if line == PLOT_ROWS else '':>{len(label)}} │", "dim", no_wrap=True)
            for i, height in enumerate(eighths):
                part = min(8, max(0, height - 8 * (line - 1)))
                text.append(" ▁▂▃▄▅▆▇█"[part] * wide, "not dim red" if i > beyond else "not dim cyan")
            yield text
        yield Text(f"{'0':>{len(label)}} └" + "─" * (wide * len(counts)), "dim", no_wrap=True)
        yield Text(" " * indent + self._axis(wide), "dim", no_wrap=True)
        if self._mark is not None:
            yield Text(self._marked(indent, wide, beyond), "yellow", no_wrap=True)

    def _axis(self, wide: int) -> str:
        """Numbers under the columns that they belong to."""
        bins = len(self._histogram.counts)
        line = [" "] * (wide * bins + 4)
        free = 0
        for tick in self._histogram.ticks(max(2, wide * bins // 7)):
            text = self._form.format(tick)
            at = max(0, min(self._histogram.bin(tick), bins) * wide - len(text) // 2)
            if at >= free and at + len(text) <= len(line):
                line[at : at + len(text)] = text
                free = at + len(text) + 1
        return "".join(line).rstrip()

    def _marked(self, indent: int, wide: int, bin: int) -> str:
        said, bins = f"data.sequence_length {self._mark:,}", len(self._histogram.counts)
        if bin >= bins:
            return f"{said} →".rjust(indent + wide * bins)
        at = indent + max(bin, 0) * wide
        return f"{said} ▲".rjust(at + 1) if at > len(said) + 1 else " " * at + f"▲ {said}"


class RowBar:
    """A packed row to scale: its documents, and what of it is empty."""

    def __init__(self, row: PackedRow) -> None:
        self._row = row

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        text = Text(no_wrap=True)
        begin = 0
        for number, document in enumerate(self._row.documents, 1):
            end = begin + document.length
            left, right = (round(at * width / self._row.sequence_length) for at in (begin, end))
            name = str(number)
            cell = name.center(right - left) if len(name) + 2 <= right - left else " " * (right - left)
            if console.color_system is None and cell:
                cell = f"[{cell[1:-1]}]" if len(cell) > 1 else "|"
            text.append(cell, f"black on {COLOURS[number % 2]}")
            begin = end
        text.append("░" * (width - len(text)), "dim")
        yield text
