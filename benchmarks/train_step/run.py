"""How fast is the step? bigtune, TRL's SFTTrainer and a plain transformers and DeepSpeed loop, on the same rows.

Beside them bigtune's step without ZeRO (bare_rank.py), whose lead over bigtune is what ZeRO-3 costs.

    python -m venv trl && trl/bin/pip install "torch==2.13.0" "deepspeed==0.19.8" "trl==1.16.0"
    python benchmarks/train_step/run.py --data gsm8k/train.jsonl --tokenizer tokenizer.json --trl trl/bin/python

The sides take turns, each in new processes, with the same model, precision, ranks, threads and cores. bigtune packs;
the plain loop reads bigtune's rows, TRL packs the same documents. Speed is real tokens over wall-clock time from
the end of the last warm-up step to that of the last step, data and logging included; what is before the end of
the first step is told apart. The roof is the rate at which all ranks at once multiply matrices of the model's
shapes (bigtune/bench/rate.py); what a side's share of it counts is the exact formula of bigtune/bench/flops.py.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bigtune import api
from bigtune.bench.flops import exact_flops, palm_flops
from bigtune.bench.machine import machine
from bigtune.bench.peaks import datasheet_tflops
from bigtune.bench.rate import measure_roof
from bigtune.config import Run
from bigtune.data.rows import Position, Row
from bigtune.launch.local import gpus
from bigtune.model.create import create_llama
from bigtune.runfile import resolve, to_yaml
from bigtune.train.fit import open_rows
from bigtune.train.precision import measure_precision

sys.path.insert(0, str(Path(__file__).parent))
from bigtune_rank import MEASURES  # a script beside this one

HERE = Path(__file__).parent
SIDES = ("bigtune", "bare", "plain", "trl")
SAVING = "saving"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Rows in any known format.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--trl", type=click.Path(path_type=Path, exists=True), help="Python of an environment with TRL.")
@click.option("--every-token", is_flag=True, help="Supervise all tokens: the rows are taken for plain text.")
@click.option("--hidden-size", default=512, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--key-value-heads", type=int, help="Default: as many.")
@click.option("--intermediate-size", type=int, help="Default: 8/3 of the width.")
@click.option("--ranks", default=2, show_default=True)
@click.option("--sequence-length", default=1024, show_default=True)
@click.option("--micro-batch", default=1, show_default=True)
@click.option("--global-batch", default=2, show_default=True)
@click.option("--steps", default=12, show_default=True)
@click.option("--warm-up", default=4, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True)
@click.option("--side", type=click.Choice(SIDES), multiple=True, help="Only these; all as it stands.")
@click.option("--save-every", type=int, help="And bigtune that saves a checkpoint after every so many steps.")
@click.option("--without", type=click.Choice(MEASURES), multiple=True, help="And bigtune with this measure taken away.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/train_step"), show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Append the figures here, a JSON line a case.")
def main(
    data: Path, tokenizer: Path, trl: Path | None, every_token: bool, hidden_size: int, layers: int, heads: int,
    key_value_heads: int | None, intermediate_size: int | None, ranks: int, sequence_length: int, micro_batch: int,
    global_batch: int, steps: int, warm_up: int, rounds: int, precision: str, side: tuple[str, ...],
    save_every: int | None, without: tuple[str, ...], work: Path, result: Path | None,
) -> None:  # fmt: skip
    """Measure one case and print its figures."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    work = work.resolve()
    if precision == "auto":
        precision = measure_precision()
    parameters = create_llama(
        tokenizer, work / "model", hidden_size, layers, heads, key_value_heads, intermediate_size,
        context=max(4096, sequence_length), tied=False,
    )  # fmt: skip
    case: dict[str, Any] = {
        "ranks": ranks, "steps": steps, "sequence_length": sequence_length, "micro_batch": micro_batch,
        "global_batch": global_batch, "precision": precision, "cuda": bool(gpus()), "save_every": save_every,
    }  # fmt: skip
    run = prepare(work, _as_text(data, work) if every_token else data, case)
    rows = _rows(run, global_batch * steps)
    _write_documents(rows, work / "documents.parquet")
    (work / "case.json").write_text(json.dumps(case))
    roof = measure_roof(work / "model", ranks, precision)
    squares = sum(row.work for row in rows) / sum(row.tokens for row in rows)
    sheet = ranks * (datasheet_tflops(machine()["gpu"], precision) or 0.0)
    sides = [*(side or (SIDES if trl else SIDES[:-1])), *([SAVING] if save_every else [])]
    sides += [f"without {measure}" for measure in without]
    measured: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name in sides:
            if name in failed:
                continue
            try:
                found = measure(name, work, case, str(trl or sys.executable), warm_up)
            except RuntimeError as error:
                failed[name] = str(error)
                continue
            of_token = exact_flops(roof.shape, 1, found["supervised_share"], squares)
            palm = palm_flops(roof.shape, 1, sequence_length)
            found |= _shares(found["tokens_per_second"], of_token, palm, roof.tflops, sheet)
            measured.setdefault(name, []).append(found)
            click.echo(f"{name}: {json.dumps(_rounded(found))}", err=True)
    speeds = {name: statistics.median(run["tokens_per_second"] for run in runs) for name, runs in measured.items()}
    figures = {
        "parameters": parameters,
        **case,
        "data": data.name + (", every token supervised" if every_token else ""),
        "matrix_products_tflops": roof.tflops,
        **{name: _medians(runs) for name, runs in measured.items()},
        "failed": failed,
        "times_as_fast_as": {name: speeds["bigtune"] / speed for name, speed in speeds.items() if name != "bigtune"},
        "machine": machine(),
    }
    click.echo(json.dumps(_rounded(figures), indent=1))
    if result:
        with result.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(figures)) + "\n")


def _shares(speed: float, of_token: float, palm: float, roof: float, sheet: float) -> dict[str, float]:
    """What a speed is of the roofs, in tokens a second, operations of a token and 10^12 operations a second."""
    shares = {"share_of_the_roof": speed * of_token * 1e-12 / roof}
    if sheet:
        shares["share_of_the_datasheet"] = speed * of_token * 1e-12 / sheet
        shares["share_of_the_datasheet_by_palm"] = speed * palm * 1e-12 / sheet
    return shares


def prepare(work: Path, data: Path, case: dict[str, Any]) -> Run:
    run = resolve(
        {
            "model": {"path": str(work / "model")},
            "data": {"sources": [{"path": str(data.resolve())}], "sequence_length": case["sequence_length"]},
            "optim": {"name": "adamw", "learning_rate": 1e-4, "schedule": "constant"},
            "train": {key: case[key] for key in ("steps", "micro_batch", "global_batch", "precision")},
            "checkpoint": {"enabled": False},
            "output": str(work / "run"),
        }
    )
    (work / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    api.prepare(run)
    return run


def measure(side: str, work: Path, case: dict[str, Any], trl: str, warm_up: int) -> dict[str, float]:
    """One side's run: tokens a second after the warm-up, seconds from the command to the end of the first step.

    Raises:
        RuntimeError: it failed; its last words are printed.
    """
    shutil.rmtree(work / "run" / "checkpoints", ignore_errors=True)
    (work / "run" / "metrics.jsonl").unlink(missing_ok=True)
    output: list[tuple[float, str]] = []
    began, peak = time.monotonic(), 0
    with subprocess.Popen(
        _command(side, work, case, trl), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **({} if case["cuda"] else {"DS_ACCELERATOR": "cpu"})},
    ) as process:  # fmt: skip
        reader = threading.Thread(target=_read, args=(process, output))
        reader.start()
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.2)
        reader.join()
    if process.returncode:
        last = "".join(line for _, line in output[-40:])
        click.echo(last, err=True)
        killed = "killed" if "return code = -9" in last or "signal 9" in last else "failed"
        raise RuntimeError(f"{killed}, exit code {process.returncode}")
    path = work / (f"{side}.jsonl" if side in SIDES[1:] else "run/metrics.jsonl")
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(steps) == case["steps"], f"{side}: {len(steps)} steps"
    after = steps[warm_up:]
    tokens, supervised = (sum(step[key] for step in after) for key in ("tokens", "supervised_tokens"))
    first = next(when for when, line in output if line.startswith(("memory of a rank", "first step")))
    return {
        "tokens_per_second": tokens / (after[-1]["time"] - steps[warm_up - 1]["time"]),
        "supervised_share": supervised / tokens,
        "first_step_seconds": first - began,
        "peak_memory_gib": max(step["peak_memory_gib"] for step in steps) if case["cuda"] else peak / 2**30,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
    }


def _read(process: "subprocess.Popen[str]", output: list[tuple[float, str]]) -> None:
    """What a command prints, and when."""
    assert process.stdout is not None
    output.extend((time.monotonic(), line) for line in process.stdout)


def _command(side: str, work: Path, case: dict[str, Any], trl: str) -> list[str]:
    ranks = str(case["ranks"])
    if side in ("bigtune", SAVING):
        command = [sys.executable, "-m", "bigtune.cli", "train", str(work / "run.yaml"), "--ranks", ranks]
        saves = ["checkpoint.enabled=true", f"checkpoint.every_steps={case['save_every']}", "checkpoint.keep_last=1"]
        return command if side == "bigtune" else [*command, *(word for key in saves for word in ("--set", key))]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    python = trl if side == "trl" else sys.executable
    options = ["--num_accelerators", ranks, "--master_port", str(port)]
    script = [f"{side}_rank.py", str(work)]
    if side not in SIDES:
        script = ["bigtune_rank.py", side.removeprefix("without "), str(work / "run.yaml")]
    return [python, "-m", "deepspeed.launcher.runner", *options, str(HERE / script[0]), *script[1:]]


def _rows(run: Run, count: int) -> list[Row]:
    with closing(open_rows(run)) as rows:
        return rows.take(Position(), count)[0]


def _write_documents(rows: list[Row], path: Path) -> None:
    """For TRL, tokenized: what is not learnt has label -100."""
    ids, labels = [], []
    for document in (document for row in rows for document in row.documents):
        tokens = document.input_ids.tolist()
        learnt = [-100] * len(tokens)
        for start, end in document.spans.tolist():
            learnt[start:end] = tokens[start:end]
        ids.append(tokens)
        labels.append(learnt)
    pq.write_table(pa.table({"input_ids": ids, "labels": labels}), path)


def _as_text(data: Path, work: Path) -> Path:
    """The same rows as plain text."""
    path = work / "text.jsonl"
    lines = (json.loads(line) for line in data.read_text(encoding="utf-8").splitlines())
    path.write_text("".join(json.dumps({"text": "\n".join(map(str, row.values()))}) + "\n" for row in lines))
    return path


def _memory(pid: int) -> int:
    """Resident bytes of a command's processes, added up: what they share counts in each."""
    total = 0
    try:
        for process in psutil.Process(pid).children(recursive=True):
            total += process.memory_info().rss
    except psutil.Error:
        pass
    return total


def _medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    medians: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return medians | {"tokens_per_second_of_each": [run["tokens_per_second"] for run in runs]}


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


if __name__ == "__main__":
    main()
