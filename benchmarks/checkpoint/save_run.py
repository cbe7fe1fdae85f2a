"""How long the training waits for a checkpoint: written beside it, waited for, and by DeepSpeed itself.

    python benchmarks/checkpoint/save_run.py --result benchmarks/checkpoint/save.json

The same run of a Llama of 400M parameters, by `bigtune train`, on a GPU a rank where there are some: without saves,
with saves that the training waits for, and with saves beside it, in turn. All are flushed to the disk. What it costs is
the time of the same steps with saves, less that without, over the number of saves: the writer's share of the cores is
in it. The first save is told apart, since the copy's memory is new then. Whole runs differ by more than that, so
that it is told within a run as well: how much longer the steps with a save are than the others. DeepSpeed's own
`save_checkpoint`, of the same model on the same ranks, is followed by a flush of its files.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from bigtune import api
from bigtune.bench.machine import machine
from bigtune.model.create import create_llama
from bigtune.runfile import resolve, to_yaml

MODES: dict[str, dict[str, Any]] = {
    "without": {"every_steps": None},
    "waited for": {"asynchronous": False},
    "beside": {"asynchronous": True},
}


@click.command()
@click.option("--rounds", default=2, show_default=True)
@click.option("--steps", default=14, show_default=True)
@click.option("--every", default=3, show_default=True)
@click.option("--hidden-size", default=1024, show_default=True)
@click.option("--layers", default=24, show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--sequence-length", default=128, show_default=True)
@click.option("--micro-batch", default=1, show_default=True)
@click.option("--global-batch", default=2, show_default=True)
@click.option("--precision", default="float32", show_default=True)
@click.option("--result", type=click.Path(path_type=Path))
def main(
    rounds: int, steps: int, every: int, hidden_size: int, layers: int, ranks: int, sequence_length: int,
    micro_batch: int, global_batch: int, precision: str, result: Path | None,
) -> None:  # fmt: skip
    """Train in each mode, in turn, and tell what a save costs."""
    batches = {"steps": steps, "micro_batch": micro_batch, "global_batch": global_batch, "precision": precision}
    with tempfile.TemporaryDirectory(prefix="bigtune-save-", dir=Path.cwd()) as name:
        folder = Path(name)
        parameters = prepare(folder, hidden_size, layers, sequence_length)
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        firsts: dict[str, list[float]] = {mode: [] for mode in MODES}
        written: dict[str, list[float]] = {mode: [] for mode in MODES}
        within: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode, section in MODES.items():
                ends, saves = train(
                    folder, ranks, sequence_length, batches, {"every_steps": every, "keep_last": 1, **section}
                )
                firsts[mode].append(ends[every + 1] - ends[every])
                seconds[mode].append(ends[steps] - ends[every + 1])
                within[mode] += longer_steps(ends, every) if saves else []
                written[mode] += saves
                click.echo(f"{mode}: {firsts[mode][-1]:.1f} s, {seconds[mode][-1]:.1f} s, saves {saves}")
        size = sum(path.stat().st_size for path in (folder / "sizes").iterdir())
        own = deepspeed(folder, ranks, precision)
        disk = disk_speed(folder)
    saves = len([step for step in range(every + 1, steps) if step % every == 0])
    stall, first = (
        {mode: (statistics.median(took[mode]) - statistics.median(took["without"])) / count for mode in list(MODES)[1:]}
        for took, count in ((seconds, saves), (firsts, 1))
    )
    figures = {
        "parameters": parameters,
        "ranks": ranks,
        "precision": precision,
        "tokens_a_step": global_batch * sequence_length,
        "checkpoint_gb": round(size / 1e9, 3),
        "seconds_of_the_steps": seconds,
        "saves": saves,
        "stall_seconds": {mode: round(value, 3) for mode, value in stall.items()},
        "stall_seconds_within_a_run": {mode: round(statistics.median(within[mode]), 3) for mode in stall},
        "each_within_a_run": {mode: [round(value, 2) for value in within[mode]] for mode in stall},
        "first_stall_seconds": {mode: round(value, 3) for mode, value in first.items()},
        "beside_over_waited_for": round(stall["beside"] / stall["waited for"], 3),
        "seconds_to_write": {mode: values for mode, values in written.items() if values},
        "deepspeed_seconds": own,
        "disk_gb_a_second": disk,
        "machine": machine(),
    }
    click.echo(json.dumps(figures, indent=1))
    if result:
        result.write_text(json.dumps(figures, indent=1) + "\n")


def longer_steps(ends: dict[int, float], every: int) -> list[float]:
    """By how much each step with a save in it took longer than the same run's other ones, but for the first save."""
    took = {step: ends[step] - ends[step - 1] for step in ends if step > every + 1}
    plain = statistics.median(seconds for step, seconds in took.items() if (step - 1) % every)
    return [seconds - plain for step, seconds in took.items() if (step - 1) % every == 0]


def prepare(folder: Path, hidden_size: int, layers: int, sequence_length: int) -> int:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.tiny import tiny_tokenizer, write_rows

    tokenizer = tiny_tokenizer(folder / "tokenizer")
    parameters = create_llama(
        tokenizer, folder / "model", hidden_size, layers, 16, intermediate_size=4 * hidden_size, context=sequence_length
    )
    write_rows(folder / "rows.jsonl", count=20_000)
    (folder / "sizes").mkdir()
    return parameters


def train(
    folder: Path, ranks: int, sequence_length: int, batches: dict[str, Any], section: dict[str, Any]
) -> tuple[dict[int, float], list[float]]:
    """When each step ended, and the seconds of each save but the last step's, which every run has and comes after."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    run = resolve(
        {
            "model": {"path": str(folder / "model")},
            "data": {
                "sources": [{"path": str(folder / "rows.jsonl")}], "sequence_length": sequence_length,
                "store": str(folder / "store"),
            },
            "optim": {"name": "adamw", "learning_rate": 1e-5},
            "train": batches,
            "checkpoint": section,
            "output": str(output),
        }
    )  # fmt: skip
    (folder / "run.yaml").write_text(to_yaml(run))
    api.prepare(run)
    os.sync()
    command = [sys.executable, "-m", "bigtune.cli", "train", str(folder / "run.yaml"), "--ranks", str(ranks)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ends = {line["step"]: line["time"] for line in lines}
    log = (output / "logs" / "rank-0.log").read_text()
    saves = [(int(step), float(took)) for step, took in re.findall(r"saved \S+step-(\d+) in ([\d.]+) s", log)]
    for path in (output / "checkpoints").glob(f"step-{batches['steps']}/rank-*"):
        (folder / "sizes" / path.name).write_bytes(b"")
        os.truncate(folder / "sizes" / path.name, path.stat().st_size)
    return ends, [took for step, took in saves if step != batches["steps"]]


def deepspeed(folder: Path, ranks: int, precision: str) -> dict[str, Any]:
    """What DeepSpeed's own save takes, and its size."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": str(ranks)}
    world["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    script, result = Path(__file__).with_name("save_rank.py"), folder / "deepspeed.json"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "model"), str(folder / "peer"), str(result), precision],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    assert [process.wait() for process in processes] == [0] * ranks
    return dict(json.loads(result.read_text()))


def disk_speed(folder: Path) -> float:
    """GB a second of 1 GiB written and flushed."""
    content, began = os.urandom(2**24), time.monotonic()
    with (folder / "disk").open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(content)
        os.fsync(file.fileno())
    return round(2**30 / 1e9 / (time.monotonic() - began), 3)


if __name__ == "__main__":
    main()
