"""How long from rows to packed documents? bigtune beside TRL, as whole processes, in turn.

    python -m venv trl && trl/bin/pip install "torch==2.13.0" "trl==1.16.0"
    python benchmarks/prepare/run.py --data DIR --tokenizer tokenizer.json --trl trl/bin/python --result result.json

DIR holds gsm8k/, gpteacher/ and sharegpt/. Their rows are written as `messages` to one file, over and over with a
number before each first question, until there are enough. Both sides get this file, the same tokenizer and chat
template, the same cores; the start of the interpreter counts. Beside them stands what the tokenizer alone takes for the
same texts on as many cores, which nothing can beat.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from bigtune.config import Source
from bigtune.data.conversation import Conversation
from bigtune.data.formats import read_conversations
from bigtune.model.create import create_llama

SOURCES = ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "gpteacher/codegen.json", "sharegpt/conversations.json")
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
TRL_SIDE = Path(__file__).parent / "trl_side.py"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), required=True, help="A tokenizer.json.")
@click.option("--trl", type=click.Path(path_type=Path, exists=True), help="Python of an environment with TRL.")
@click.option("--rows", default=40_000, show_default=True)
@click.option("--sequence-length", default=2048, show_default=True)
@click.option("--processes", default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Write the result here as well.")
def main(
    data: Path,
    tokenizer: Path,
    trl: Path | None,
    rows: int,
    sequence_length: int,
    processes: int,
    repeats: int,
    result: Path | None,
) -> None:
    """Measure and print the result as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = _write_rows(data, folder / "rows.jsonl", rows)
        create_llama(tokenizer, folder / "model", 64, 1, 4, max_shard_size="500MB")
        (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
        sides: dict[str, list[dict[str, Any]]] = {}
        for _ in range(repeats):
            _add(sides, "bigtune prepare", _bigtune(folder, sequence_length, processes))
            _add(sides, "bigtune prepare, nothing changed", _bigtune(folder, sequence_length, processes, again=True))
            for masked, side in ((1, "TRL, completions learnt"), (0, "TRL, all learnt")):
                if trl is not None:
                    _add(sides, side, _trl(trl, folder, sequence_length, processes, masked))
            _add(sides, "tokenizer alone", _tokenizer_alone(folder, processes))
    figures: dict[str, Any] = {"rows": written, "processes": processes, "sequence_length": sequence_length}
    for side, runs in sides.items():
        seconds = sorted(run["seconds"] for run in runs)
        figures[side] = {**runs[-1], "seconds": statistics.median(seconds), "least": seconds[0], "most": seconds[-1]}
    for side in ("TRL, completions learnt", "TRL, all learnt"):
        if side in figures:  # round by round, since the machine's speed drifts
            pairs = zip(sides[side], sides["bigtune prepare"], strict=True)
            ratios = sorted(round(its["seconds"] / ours["seconds"], 2) for its, ours in pairs)
            figures[f"{side}: times bigtune's"] = {"median": statistics.median(ratios), "of each round": ratios}
    text = json.dumps(figures, indent=1) + "\n"
    click.echo(text, nl=False)
    if result:
        result.write_text(text, encoding="utf-8")


def _add(sides: dict[str, list[dict[str, Any]]], side: str, run: dict[str, Any]) -> None:
    sides.setdefault(side, []).append(run)
    click.echo(f"{side}: {run['seconds']:.1f} s", err=True)


def _write_rows(data: Path, path: Path, least: int) -> int:
    conversations = list(read_conversations([Source(path=data / name) for name in SOURCES], "error"))
    rounds = -(-least // len(conversations))
    number = itertools.count()
    with path.open("w", encoding="utf-8") as file:
        for conversation in conversations * rounds:
            file.write(json.dumps({"messages": list(_turns(conversation, next(number)))}) + "\n")
    return len(conversations) * rounds


def _turns(conversation: Conversation, number: int) -> Iterator[dict[str, str]]:
    for i, message in enumerate(conversation.messages):
        yield {"role": message.role, "content": message.content if i else f"{number}. {message.content}"}


def _timed(command: Sequence[str]) -> tuple[float, str]:
    began = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return round(time.perf_counter() - began, 2), output


def _bigtune(folder: Path, length: int, processes: int, again: bool = False) -> dict[str, Any]:
    if not again:
        shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run.yaml").write_text(
        f"model: {{path: {folder}/model}}\n"
        f"data: {{sources: [{{path: {folder}/rows.jsonl}}], sequence_length: {length}, workers: {processes}}}\n"
        f"train: {{epochs: 1}}\noutput: {folder}/run\n"
    )
    command = [sys.executable, "-m", "bigtune.cli"]
    seconds, _ = _timed([*command, "prepare", f"{folder}/run.yaml"])
    figures = json.loads(_timed([*command, "inspect", f"{folder}/run.yaml", "--json"])[1])
    kept = ("rows", "tokens", "supervised_tokens", "packing_efficiency")
    return {"seconds": seconds, **{name: figures[name] for name in kept}}


def _trl(python: Path, folder: Path, length: int, processes: int, masked: int) -> dict[str, Any]:
    arguments = [f"{folder}/rows.jsonl", f"{folder}/model", str(length), str(processes), str(masked)]
    seconds, output = _timed([str(python), str(TRL_SIDE), *arguments])
    return {"seconds": seconds, **json.loads(output.splitlines()[-1])}


def _tokenizer_alone(folder: Path, processes: int) -> dict[str, Any]:
    """Seconds of `encode_batch` on the rendered texts, with threads of its own on all cores, and nothing else."""
    code = (
        "import json, sys, time; from tokenizers import Tokenizer;"
        "t = Tokenizer.from_file(sys.argv[2]);"
        "rows = [json.loads(line)['messages'] for line in open(sys.argv[1])];"
        "texts = [''.join(f\"<|{m['role']}|>\\n{m['content']}<|endoftext|>\\n\" for m in row) for row in rows];"
        "b = time.perf_counter();"
        "n = sum(len(e) for i in range(0, len(texts), 4000) for e in t.encode_batch(texts[i:i + 4000]));"
        "print(time.perf_counter() - b, n)"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(processes)}
    command = [sys.executable, "-c", code, f"{folder}/rows.jsonl", f"{folder}/model/tokenizer.json"]
    seconds, tokens = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout.split()
    return {"seconds": round(float(seconds), 2), "tokens": int(tokens)}


if __name__ == "__main__":
    main()
