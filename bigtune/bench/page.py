"""The results of a benchmark as one web page that needs nothing beside itself: tables, and plots of speed and time."""

from collections.abc import Sequence
from pathlib import Path

from bigtune.bench.plots import bars_svg
from bigtune.bench.result import Result
from bigtune.bench.words import caveats, hardware_told, settings_told
from bigtune.report.page import fill

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render_page(results: Sequence[Result]) -> str:
    """The page's HTML."""
    measured = {number: result.figures for number, result in enumerate(results, 1) if result.figures}
    speeds = {
        number: [("bar", figures.tokens_per_second, f"{figures.tokens_per_second:,.0f} tokens/s")]
        for number, figures in measured.items()
    }
    phases = {
        number: [
            (f"phase {name}", share["share"] * sum(figures.steps["seconds"]) / len(figures.steps["seconds"]),
             f"{name}: {share['share']:.1%}")
            for name, share in figures.phases.items()
        ]
        for number, figures in measured.items()
        if "other" in figures.phases  # else they were not timed
    }  # fmt: skip
    return fill(
        TEMPLATE,
        results=results,
        told=settings_told,
        names=list(dict.fromkeys(name for figures in measured.values() for name in figures.phases)),
        kinds=list(dict.fromkeys(kind for figures in measured.values() for kind in figures.memory_gib)),
        speeds=bars_svg(speeds, "tokens a second, by case", "{:,.0f}"),
        phases=bars_svg(phases, "seconds of a step by phase, by case", "{:.3g}") if phases else None,
        notes=[*hardware_told(results), *caveats(results)],
    )
