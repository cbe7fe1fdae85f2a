"""`bigtune evaluate`: one model or two, at one or more numbers of examples, as tables or as JSON."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bigtune import api
from bigtune.config import Run
from bigtune.errors import ConfigError
from bigtune.evaluate.table import render, render_shots, render_versus
from bigtune.evaluate.versus import versus


def evaluate(run: Run, model: Path, base: Path | None, shots: str, as_json: bool) -> None:
    """Score, and print what was found."""
    counts = _counts(shots)
    before = api.evaluate_shots(run, base, counts) if base else []
    reports = api.evaluate_shots(run, model, counts)
    compared = [versus(old, new) for old, new in zip(before, reports, strict=True)] if base else []
    if as_json:
        plain: list[dict[str, Any]] = [found.to_json() for found in compared or reports]
        click.echo(json.dumps(plain if len(plain) > 1 else plain[0], indent=1))
        return
    console = Console(highlight=False)
    for found in compared:
        console.print(render_versus(found))
    if not compared and len(reports) > 1:
        console.print(render_shots(reports))
    elif not compared:
        console.print(render(reports[0]))


def _counts(shots: str) -> list[int]:
    try:
        counts = [int(word) for word in shots.split(",")] if shots else []
    except ValueError:
        counts = [-1]
    if any(count < 0 for count in counts):
        raise ConfigError(f"--shots {shots}: write numbers, as in --shots 0,1,3")
    return counts
