"""What `bigtune bench` prints, and its exit code."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from bigtune import api
from bigtune.bench import table
from bigtune.bench.compare import compare as compare_results
from bigtune.bench.result import FILE, Result, read_results, results_folder
from bigtune.bench.sweep import parse_ranks
from bigtune.bench.words import settings_told
from bigtune.process import STOPPED


@dataclass(frozen=True, slots=True)
class Shown:
    """How results are shown."""

    html: Path | None
    as_json: bool


def bench(
    run_file: Path,
    overrides: Sequence[str],
    sweep: Sequence[str],
    ranks: str | None,
    steps: tuple[int, int],
    output: Path | None,
    shown: Shown,
) -> int:
    """Measure, telling of each case as it ends, then show all; what was measured before Ctrl-C is shown too.

    Args:
        steps: measured ones, and the warm-up before.

    Returns:
        0 where any case was measured.
    """
    output = output or results_folder(run_file)
    counts = parse_ranks(ranks) if ranks else ()
    results: list[Result] = []
    code = 0
    try:
        for result in api.bench(run_file, sweep, counts, overrides, *steps, output):
            results.append(result)
            print(_line(result), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = STOPPED
    _show(results, shown)
    print(f"{output / FILE}", file=sys.stderr)
    return code or int(not any(result.figures for result in results))


def _show(results: Sequence[Result], shown: Shown) -> None:
    if shown.html is not None:
        from bigtune.bench.page import render_page
        from bigtune.report.page import write_page

        write_page(render_page(results), shown.html)
    if shown.as_json:
        for result in results:
            click.echo(json.dumps(result.to_json()))
    else:
        Console(highlight=False).print(table.render(results))


def _line(result: Result) -> str:
    name = f"bench: {settings_told(result)}, ranks {result.case.ranks}"
    if not result.figures:
        return f"{name}: not measured: {result.reason}"
    return f"{name}: {result.figures.tokens_per_second:,.0f} tokens/s"


def compare(before: Path, after: Path, as_json: bool) -> None:
    """Show what changed between two files of results, or the folders that they lie in."""
    found = compare_results(read_results(before), read_results(after))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        Console(highlight=False).print(table.render_comparison(found))
