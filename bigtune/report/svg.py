"""Histograms as inline SVG: no script and nothing from elsewhere; the page's style sheet colours them."""

from markupsafe import Markup

from bigtune.report.histogram import Histogram

WIDTH, HEIGHT = 720, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 26, 34
FLOOR = HEIGHT - BOTTOM

HEAD = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">')
GRID = Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
Y_LABEL = Markup('<text class="y" x="{}" y="{:.1f}">{:,.0f}</text>')
TICK = Markup('<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
X_LABEL = Markup('<text class="x" x="{:.1f}" y="{}">{}</text>')
BAR = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
MARK = Markup('<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
MARK_LABEL = Markup('<text class="mark" x="{:.1f}" y="{}" text-anchor="{}">{}</text>')


def histogram_svg(histogram: Histogram, label: str, form: str, mark: tuple[int, str] | None = None) -> Markup:
    """A picture of a histogram; every bar tells its count when it is pointed at.

    Args:
        label: what it shows, for readers that cannot see it.
        form: how a value is written, as in `{:,.0f}`.
        mark: a value that is marked on the axis, and its name; what is beyond it is drawn as trouble.
    """
    most = max(histogram.counts)
    parts = [HEAD.format(WIDTH, HEIGHT, label)]
    for tick in Histogram((0.0, float(max(most, 1))), (0,), logarithmic=False).ticks(4):
        y = _y(tick, most)
        parts += [GRID.format(LEFT, WIDTH - RIGHT, y=y), Y_LABEL.format(LEFT - 8, y + 4, tick)]
    parts += [_bar(histogram, i, most, form, mark) for i, count in enumerate(histogram.counts) if count]
    for tick in histogram.ticks(8):
        x = _x(histogram.place(tick))
        parts += [TICK.format(FLOOR, FLOOR + 5, x=x), X_LABEL.format(x, FLOOR + 20, form.format(tick))]
    if mark:
        parts.append(_mark(histogram, *mark))
    return Markup("").join([*parts, Markup("</svg>")])


def _bar(histogram: Histogram, i: int, most: int, form: str, mark: tuple[int, str] | None) -> Markup:
    low, high = histogram.edges[i], histogram.edges[i + 1]
    left, right = _x(histogram.place(low)), _x(histogram.place(high))
    y = min(_y(histogram.counts[i], most), FLOOR - 1)  # one is seen beside thousands
    kind = "bar beyond" if mark and low > mark[0] else "bar"
    told = f"{form.format(low)} to {form.format(high)}: {histogram.counts[i]:,}"
    return BAR.format(kind, left + 0.5, y, max(right - left - 1, 0.5), FLOOR - y, told)


def _mark(histogram: Histogram, value: int, name: str) -> Markup:
    place = histogram.place(value)
    x = _x(min(max(place, 0.0), 1.0))
    anchor, gap = ("end", -6) if place > 0.5 else ("start", 6)
    if place > 1:
        return MARK_LABEL.format(x, TOP - 10, anchor, f"{name} →")
    if place < 0:
        return MARK_LABEL.format(x, TOP - 10, anchor, f"← {name}")
    return MARK.format(TOP - 8, FLOOR, x=x) + MARK_LABEL.format(x + gap, TOP - 10, anchor, name)


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _y(count: float, most: int) -> float:
    return FLOOR - count / max(most, 1) * (FLOOR - TOP)
