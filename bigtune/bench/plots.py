"""Bars lying on their side as inline SVG, one a case: no script; the page's style sheet colours them."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from bigtune.report.histogram import Histogram
from bigtune.report.svg import HEAD, X_LABEL

WIDTH, LEFT, RIGHT, TOP, FOOT = 720, 34, 76, 8, 30
PITCH, THICK = 30, 20
"""From bar to bar, and of a bar."""

GRID = Markup('<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
NUMBER = Markup('<text class="y" x="{}" y="{:.1f}">{}</text>')
BAR = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"><title>{}</title></rect>')
VALUE = Markup('<text x="{:.1f}" y="{:.1f}">{}</text>')
END = Markup("</svg>")


def bars_svg(cases: Mapping[int, Sequence[tuple[str, float, str]]], label: str, form: str) -> Markup:
    """A bar a case, of parts laid end to end; every part tells what it is when it is pointed at.

    Args:
        cases: by number, the parts: a class of the style sheet, a length, and what is told of it.
        label: what the bars show, for readers that cannot see them.
        form: how a length is written, as in `{:,.0f}`.
    """
    most = max((sum(length for _, length, _ in parts) for parts in cases.values()), default=0.0) or 1.0
    floor = TOP + PITCH * len(cases)
    svg = [HEAD.format(WIDTH, floor + FOOT, label)]
    for tick in Histogram((0.0, most), (0,), logarithmic=False).ticks(6):
        svg += [
            GRID.format(TOP, floor, x=_x(tick, most)),
            X_LABEL.format(_x(tick, most), floor + 18, form.format(tick)),
        ]
    for row, (number, parts) in enumerate(cases.items()):
        top, begin = TOP + PITCH * row + (PITCH - THICK) / 2, 0.0
        svg.append(NUMBER.format(LEFT - 8, top + THICK - 5, number))
        for kind, length, told in parts:
            x, end = _x(begin, most), _x(begin + length, most)
            svg.append(BAR.format(kind, x, top, max(end - x, 0.5), THICK, told))
            begin += length
        svg.append(VALUE.format(_x(begin, most) + 6, top + THICK - 5, form.format(begin)))
    return Markup("").join([*svg, END])


def _x(length: float, most: float) -> float:
    return LEFT + length / most * (WIDTH - LEFT - RIGHT)
