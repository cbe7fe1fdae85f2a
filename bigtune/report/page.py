"""An inspection as one web page that needs nothing beside itself: no network, no script."""

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bigtune.errors import ConfigError
from bigtune.report.inspection import Inspection
from bigtune.report.svg import histogram_svg
from bigtune.report.tokens import shorten
from bigtune.report.words import cuts_told, imbalance_told, row_told, steps_told
from bigtune.visible import visible

TEMPLATE, STYLE = (Path(__file__).with_name(name) for name in ("page.html.jinja", "style.css"))
SAMPLE_TOKENS, PART_TOKENS = 3000, 240
"""Of a sample, and of a document in a packed row, so many are shown."""
PARTS = 100
"""Documents of a packed row that are shown as text."""


def write_page(page: str, path: Path) -> None:
    """Write a page's HTML, and the folders that it lies in.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--html {path}: cannot be written ({reason}); name another file") from None


def render_page(inspection: Inspection) -> str:
    """The page's HTML. All text of the data is escaped."""
    length = inspection.sequence_length
    plots: dict[str, Markup | None] = {"lengths": None, "shares": None}
    if inspection.lengths and inspection.supervised_shares:
        mark = (length, f"data.sequence_length {length:,}")
        plots["lengths"] = histogram_svg(inspection.lengths, "documents by their tokens", "{:,.0f}", mark)
        plots["shares"] = histogram_svg(inspection.supervised_shares, "documents by their supervised share", "{:.0%}")
    return fill(
        TEMPLATE,
        seen=inspection,
        plots=plots,
        cuts=list(cuts_told(inspection)),
        row_told=row_told,
        steps_told=steps_told,
        imbalance_told=imbalance_told,
        shorten=shorten,
        sample_tokens=SAMPLE_TOKENS,
        part_tokens=PART_TOKENS,
        most_parts=PARTS,
    )


def fill(template: Path, **values: Any) -> str:
    """A page of a template, in the style of all pages; all text is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=_count, percent=_percent, visible=visible)
    style = Markup(STYLE.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}%}"
