"""The main job, told from raw data to answers before and after: what `bigtune demo` runs.

    world ──▶ tokenizer, small Llama ──pretrain (plain text)──▶ base ──tune (instructions)──▶ tuned
                                                                  └──────── evaluate ────────────┘

Pretraining and tuning go through the same stages as a user's run, on two ZeRO-3 workers.
"""

import json
import random
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bigtune import api
from bigtune.config import Run
from bigtune.demo.tasks import instruction_rows
from bigtune.demo.tokenizer import train_tokenizer
from bigtune.demo.world import pretraining_texts
from bigtune.errors import LaunchError
from bigtune.evaluate.report import Report
from bigtune.evaluate.table import render_versus
from bigtune.evaluate.versus import versus
from bigtune.launch.local import gpus
from bigtune.model.create import create_llama
from bigtune.runfile import load_run

RANKS = 2
PRETRAIN: dict[str, Any] = {
    "optim": {"name": "adamw", "learning_rate": 2e-3, "warmup_steps": 20, "weight_decay": 0.1},
    "train": {"steps": 1300, "global_batch": 2},
}
TUNE: dict[str, Any] = {
    "optim": {"name": "adamw_8bit", "learning_rate": 5e-4, "warmup_steps": 5, "weight_decay": 0.1},
    "train": {"steps": 200, "global_batch": 4},
}
SHAPE: dict[str, Any] = {"hidden_size": 128, "layers": 2, "heads": 4, "intermediate_size": 384, "context": 512}
SEQUENCE_LENGTH = 512


def tell(output: Path, seed: int = 0, shuffled_answers: bool = False) -> tuple[Report, Report]:
    """Run the whole story into a new folder and print its end.

    Args:
        shuffled_answers: tune on answers that are dealt out anew over all training rows; the control, in
            which nothing can be learnt.

    Returns:
        The reports of base and tuned.

    Raises:
        LaunchError: the folder is in use, or a stage failed or was interrupted.
    """
    if output.exists() and any(output.iterdir()):
        if not (output / "demo.json").is_file():
            raise LaunchError(f"{output}: exists and is no demo's; give another --output")
        shutil.rmtree(output)
    began = time.monotonic()
    console = Console(stderr=True, highlight=False)
    console.rule("1 of 5  data, tokenizer and a small Llama with fresh weights")
    _make_data(output, seed, shuffled_answers)
    parameters = create_llama(output / "tokenizer", output / "fresh", seed=seed, max_shard_size="500KB", **SHAPE)
    console.print(f"a Llama of {parameters:,} parameters in {_count_shards(output / 'fresh')} files")
    console.rule("2 of 5  pretrain on plain text")
    base = _train(output, "base", "fresh", "text.jsonl", PRETRAIN, seed)
    console.rule("3 of 5  tune on instructions")
    tuned = _train(output, "tuned", "base", "train.jsonl", TUNE, seed)
    console.rule("4 of 5  evaluate the base: plain text, four examples first")
    base_report = api.evaluate(_evaluation(output, {"prompt": "plain", "shots": 4}), base)
    console.rule("5 of 5  evaluate the tuned model: the bare question")
    tuned_report = api.evaluate(_evaluation(output, {}), tuned)
    _print_end(base_report, tuned_report, seed)
    console.print(f"the tuned model is in {tuned}; {time.monotonic() - began:.0f} s in all")
    return base_report, tuned_report


def _make_data(output: Path, seed: int, shuffled_answers: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps({"seed": seed, "shuffled_answers": shuffled_answers}) + "\n")
    texts, rows = pretraining_texts(seed), instruction_rows(seed)
    train_tokenizer(
        [*texts, *(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows.train)],
        output / "tokenizer",
    )
    if shuffled_answers:
        answers = [row["output"] for row in rows.train]
        random.Random(seed).shuffle(answers)
        rows.train[:] = [{**row, "output": answer} for row, answer in zip(rows.train, answers, strict=True)]
    _write_lines(output / "text.jsonl", ({"text": text} for text in texts))
    _write_lines(output / "train.jsonl", rows.train)
    _write_lines(output / "held_out.jsonl", rows.held_out)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train(output: Path, name: str, model: str, rows: str, recipe: Mapping[str, Any], seed: int) -> Path:
    """Train one stage through a run file that the user can read and run again; the merged model's folder."""
    tree = {
        "model": {"path": str(output / model)},
        "data": {"sources": [{"path": str(output / rows)}], "sequence_length": SEQUENCE_LENGTH},
        "optim": recipe["optim"],
        "train": {**recipe["train"], "seed": seed},
        "evaluate": {"sources": [{"path": str(output / "held_out.jsonl")}], "max_new_tokens": 24, "batch_size": 64},
        "output": str(output / f"run-{name}"),
    }
    run_file = output / f"{name}.yaml"
    run_file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    run = load_run(run_file)
    ranks = min(RANKS, len(gpus()) or RANKS)  # a GPU is never shared
    if not api.train(run, ranks, oversubscribe=True):
        raise LaunchError(f"interrupted; `bigtune train {run_file}` goes on with this stage")
    return api.merge(run.output, output / name)


def _evaluation(output: Path, changes: Mapping[str, Any]) -> Run:
    """The tuned run, with its evaluate section changed."""
    return load_run(output / "tuned.yaml", [f"evaluate.{key}={value}" for key, value in changes.items()])


def _count_shards(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def _print_end(base: Report, tuned: Report, seed: int) -> None:
    """The table, and three answers before and after."""
    out = Console(highlight=False)
    out.print(render_versus(versus(base, tuned)))
    pairs = list(zip(base.samples, tuned.samples, strict=True))
    for before, after in random.Random(seed).sample(pairs, 3):
        out.print(f"\n[bold]{after.question}[/bold]  ({after.task}, {', '.join(after.tags)}; right: {after.reference})")
        out.print(f"  before: {before.output.strip()!r}", markup=False)
        out.print(f"  after:  {after.output.strip()!r}", markup=False)
