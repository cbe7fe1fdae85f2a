"""The main job on real data, with its figures: recipes/gsm8k.yaml on a Llama with fresh weights.

    python benchmarks/gsm8k/run.py --data DIR --tokenizer tokenizer.json --result benchmarks/gsm8k/cpu.json

DIR holds GSM8K's train.jsonl and test.jsonl. What is measured is the whole of each stage as a user waits for it,
and tokens a second over the steps after the first ones, by the clock of metrics.jsonl.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bigtune import api
from bigtune.bench.machine import machine
from bigtune.checkpoint.folder import latest, read_json
from bigtune.launch.local import gpus
from bigtune.model.create import create_llama
from bigtune.runfile import load_run

RECIPE = Path(__file__).parents[2] / "recipes" / "gsm8k.yaml"
WARM_UP = 5
"""Steps left out of the speed."""


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/benchmark-gsm8k"), show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Write the figures here as well.")
@click.option("--ranks", type=int, help="Default: GPUs, else 2.")
@click.option("--hidden-size", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--set", "overrides", multiple=True, help="Of the recipe.")
def main(
    data: Path,
    tokenizer: Path,
    output: Path,
    result: Path | None,
    ranks: int | None,
    hidden_size: int,
    layers: int,
    heads: int,
    overrides: tuple[str, ...],
) -> None:
    """Create, prepare, train, merge and evaluate; print the figures as JSON."""
    shutil.rmtree(output, ignore_errors=True)
    ranks = ranks or len(gpus()) or 2
    seconds: dict[str, float] = {}

    def timed(stage: str, action: Callable[[], Any]) -> Any:
        began = time.monotonic()
        value = action()
        seconds[stage] = round(time.monotonic() - began, 1)
        return value

    parameters = timed(
        "create", lambda: create_llama(tokenizer, output / "base", hidden_size, layers, heads, max_shard_size="500MB")
    )
    settings = [
        f"model.path={output / 'base'}", f"output={output / 'run'}",
        f"data.sources.0.path={data / 'train.jsonl'}", f"evaluate.sources.0.path={data / 'test.jsonl'}", *overrides,
    ]  # fmt: skip
    run = load_run(RECIPE, settings)
    timed("prepare", lambda: api.prepare(run))
    if not timed("train", lambda: api.train(run, ranks)):
        sys.exit("interrupted")
    timed("merge", lambda: api.merge(run.output, output / "tuned"))
    base = timed("evaluate the base", lambda: api.evaluate(run, output / "base"))
    tuned = timed("evaluate the tuned model", lambda: api.evaluate(run, output / "tuned"))
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    steady = lines[WARM_UP:] or lines
    figures = {
        "machine": machine(),
        "ranks": ranks,
        "precision": read_json(latest(run.output / "checkpoints") or run.output, "trainer.json")["precision"],
        "parameters": parameters,
        "steps": len(lines),
        "loss": {"first": lines[0]["loss"], "last": lines[-1]["loss"]},
        "tokens_per_second": round(
            sum(line["tokens"] for line in steady[1:]) / (steady[-1]["time"] - steady[0]["time"])
        ),
        "step_seconds_median": round(statistics.median(line["step_seconds"] for line in steady), 3),
        "peak_memory_gib_rank_0": lines[-1]["peak_memory_gib"],
        "seconds_to_first_step": round(lines[0]["time"], 1),
        "seconds": seconds,
        "held_out_loss": {"base": base.overall.held_out_loss.mean, "tuned": tuned.overall.held_out_loss.mean},
        "number": {"base": base.overall.metrics["number"].mean, "tuned": tuned.overall.metrics["number"].mean},
    }
    text = json.dumps(figures, indent=1) + "\n"
    click.echo(text, nl=False)
    if result:
        result.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
