"""Do 8-bit states learn as 32-bit ones do? `python benchmarks/optimizers/run.py --data DIR`

DIR holds GSM8K's train.jsonl and test.jsonl. A small Llama with fresh weights is trained with each optimizer for the
same steps on the same rows, and scored by its loss on held-out rows. 8-bit AdamW must end within 1% of 32-bit AdamW;
the exit code says so. The other optimizers, and AdamW with the rows in another order, are for comparison.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from bigtune import api
from bigtune.demo.tokenizer import train_tokenizer
from bigtune.model.create import create_llama
from bigtune.runfile import resolve

RUNS: dict[str, dict[str, Any]] = {  # learning rates as usual for each, not searched for
    "adamw": {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.1},
    "adamw_8bit": {"name": "adamw_8bit", "learning_rate": 2e-3, "weight_decay": 0.1},
    "lion_8bit": {"name": "lion_8bit", "learning_rate": 3e-4, "weight_decay": 0.7},
    "sgd": {"name": "sgd", "learning_rate": 0.5},
    "adamw, other order": {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.1},
}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/benchmark-optimizers"), show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Write the figures here as well.")
@click.option("--ranks", default=2, show_default=True)
@click.option("--steps", default=300, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)), help="Of the runs; default: all.")
def main(data: Path, output: Path, result: Path | None, ranks: int, steps: int, only: tuple[str, ...]) -> None:
    """Train with each optimizer; print losses and the bytes of optimizer state as JSON."""
    shutil.rmtree(output, ignore_errors=True)
    texts = (f"{row['question']}\n{row['answer']}" for row in _rows(data / "train.jsonl"))
    train_tokenizer(texts, output / "tokenizer", vocabulary=2048)
    parameters = create_llama(output / "tokenizer", output / "base", hidden_size=128, layers=4, heads=4)
    figures: dict[str, Any] = {"parameters": parameters, "steps": steps, "ranks": ranks, "runs": {}}
    for name in only or RUNS:
        began = time.monotonic()
        figures["runs"][name] = _one(data, output, name, ranks, steps)
        figures["runs"][name]["seconds"] = round(time.monotonic() - began)
        text = json.dumps(figures, indent=1) + "\n"
        click.echo(text, nl=False)
        if result:
            result.write_text(text, encoding="utf-8")
    losses = {name: run["held_out_loss"] for name, run in figures["runs"].items()}
    if {"adamw", "adamw_8bit"} <= losses.keys():
        sys.exit(0 if abs(losses["adamw_8bit"] / losses["adamw"] - 1) < 0.01 else 1)


def _one(data: Path, output: Path, name: str, ranks: int, steps: int) -> dict[str, Any]:
    folder = output / name.replace(", ", "-").replace(" ", "-")
    run = resolve(
        {
            "model": {"path": str(output / "base")},
            "data": {
                "sources": [{"path": str(data / "train.jsonl")}],
                "sequence_length": 320,
                "store": str(output / "store"),
            },
            "optim": {**RUNS[name], "warmup_steps": 20},
            "train": {"steps": steps, "global_batch": 4, "seed": int("other" in name)},
            # The loss of all tokens of the right answers; of what is generated, one token is enough.
            "evaluate": {"sources": [{"path": str(data / "test.jsonl")}], "max_rows": 300, "max_new_tokens": 1},
            "output": str(folder),
        }
    )
    if not api.train(run, ranks):
        sys.exit("interrupted")
    losses = [json.loads(line)["loss"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    states = sum(path.stat().st_size for path in (run.output / "checkpoints").glob("step-*/rank-*"))
    score = api.evaluate(run, api.merge(run.output, folder / "merged"))
    return {
        "first_loss": losses[0],
        "last_50_losses_mean": sum(losses[-50:]) / len(losses[-50:]),
        "held_out_loss": score.overall.held_out_loss,
        "checkpoint_bytes": states,
    }


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
