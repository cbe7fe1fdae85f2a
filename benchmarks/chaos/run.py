"""Runs that are killed again and again, and what is left of them.

    python benchmarks/chaos/run.py --kills 50 --result benchmarks/chaos/result.json --log benchmarks/chaos/log.jsonl

A small model is trained by `bigtune train` on 2 ranks, as a user starts it. Each start is killed with SIGKILL at a
random moment, a third of them while a checkpoint is being written: one rank, all ranks, DeepSpeed's launcher or the
command itself. After each kill the newest checkpoint is verified, tensor by tensor, and the same command goes on. Every
second story changes the number of ranks on the way. In the end each is compared with the run that nobody disturbed:
steps, tokens, losses, weights. A document that is lost or comes twice changes all that comes after it.
"""

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from bigtune import api
from bigtune.checkpoint.folder import latest, latest_step, rank_file
from bigtune.checkpoint.layout import MASTER, Layout
from bigtune.checkpoint.verify import verify
from bigtune.model.create import create_llama
from bigtune.runfile import resolve, to_yaml
from bigtune.tensorfile import read_header, read_into

RANKS = 2
TARGETS = ("one rank", "all ranks", "the launcher", "the command")
MOMENTS = ("at any time", "while training", "while saving")
MOST_SECONDS = 600.0
NO_ORPHAN_SECONDS = 15.0


@dataclass(frozen=True)
class Story:
    """A run that is killed until it is done."""

    folder: Path
    worlds: tuple[int, ...]
    """Numbers of ranks to draw from."""


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--stories", default=6, show_default=True, help="Runs that the kills are shared among.")
@click.option("--steps", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--log", type=click.Path(path_type=Path), help="A line for each kill.")
@click.option("--result", type=click.Path(path_type=Path))
def main(kills: int, stories: int, steps: int, seed: int, log: Path | None, result: Path | None) -> None:
    """Kill, resume, compare. Exit code 1 if anything was lost."""
    chance = random.Random(seed)
    if log:
        log.write_text("")
    with tempfile.TemporaryDirectory(prefix="bigtune-chaos-") as name:
        folder = Path(name)
        prepare(folder, steps)
        told = Story(folder / "told", (RANKS,))
        assert finish(told, RANKS) == 0
        lines: list[dict[str, Any]] = []
        endings = []
        for number in range(stories):
            story = Story(folder / f"story-{number}", (RANKS,) if number % 2 == 0 else (1, 2, 3))
            share = kills * (number + 1) // stories - kills * number // stories
            for _ in range(share):
                ranks, target, moment = map(chance.choice, (story.worlds, TARGETS, MOMENTS))
                line = {"story": number, **kill_once(story, ranks, target, moment, chance)}
                lines.append(line)
                click.echo(json.dumps(line))
                if log:
                    with log.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                if line["done"]:
                    shutil.rmtree(story.folder)
            ended = finish(story, RANKS)
            endings.append({"story": number, "code": ended, **compare(story, told)})
            click.echo(json.dumps(endings[-1]))
        figures = summary(lines, endings, steps, seed)
    click.echo(json.dumps(figures, indent=1))
    if result:
        result.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if figures["unusable_checkpoints"] == figures["orphans"] == figures["differing_runs"] == 0 else 1)


def prepare(folder: Path, steps: int) -> None:
    """Model, rows and documents, which all stories share."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.tiny import tiny_tokenizer, write_rows

    model = folder / "model"
    create_llama(tiny_tokenizer(folder / "tokenizer"), model, hidden_size=192, layers=4, heads=6, context=256)
    write_rows(folder / "rows.jsonl", count=400)
    run = resolve(
        {
            "model": {"path": str(model)},
            "data": {
                "sources": [{"path": str(folder / "rows.jsonl")}], "sequence_length": 128,
                "store": str(folder / "store"),
            },
            "optim": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
            "train": {"steps": steps, "global_batch": 4, "precision": "float32"},
            "checkpoint": {"every_steps": 2, "keep_last": 3},
            "output": str(folder / "told"),
        }
    )  # fmt: skip
    (folder / "run.yaml").write_text(to_yaml(run))
    api.prepare(run)


def start(story: Story, ranks: int) -> "subprocess.Popen[bytes]":
    """The command, in a session of its own, with its words in a file."""
    command = [
        sys.executable, "-m", "bigtune.cli", "train", str(story.folder.parent / "run.yaml"), "--ranks", str(ranks),
        "--oversubscribe", "--set", f"output={story.folder}",
    ]  # fmt: skip
    story.folder.mkdir(exist_ok=True)
    with (story.folder / "command.log").open("ab") as words:
        return subprocess.Popen(command, stdout=words, stderr=words, start_new_session=True)


def finish(story: Story, ranks: int) -> int:
    """Run to the end undisturbed; the exit code."""
    return start(story, ranks).wait(MOST_SECONDS)


def kill_once(story: Story, ranks: int, target: str, moment: str, chance: random.Random) -> dict[str, Any]:
    """Start, kill, and look at what is left."""
    before = latest_step(story.folder / "checkpoints") or 0
    process = start(story, ranks)
    wait_for(moment, story, process, chance)
    done = process.poll() is not None
    if not done:
        for victim in victims(process, target, chance):
            with suppressed():
                victim.kill()
    killed = time.monotonic()
    code = process.wait(MOST_SECONDS)
    while left := [p.pid for p in relatives(story)]:
        if time.monotonic() - killed > NO_ORPHAN_SECONDS + 60:
            break
        time.sleep(0.05)
    seconds = time.monotonic() - killed
    orphans = seconds > NO_ORPHAN_SECONDS
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    remains = sorted(path.name for path in (story.folder / "checkpoints").glob("*.partial"))
    after = latest_step(story.folder / "checkpoints") or 0
    return {
        "ranks": ranks, "target": target, "moment": moment, "from_step": before, "latest": after, "code": code,
        "done": done, "remains": remains, "seconds_to_end": round(seconds, 2), "orphans": orphans,
        "problems": problems(story),
    }  # fmt: skip


class suppressed:
    """What is gone already is gone."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *_: object) -> bool:
        return kind is not None and issubclass(kind, psutil.NoSuchProcess | ProcessLookupError)


def wait_for(moment: str, story: Story, process: "subprocess.Popen[bytes]", chance: random.Random) -> None:
    """Until it is time to kill, or the command has ended."""
    until = time.monotonic() + (chance.uniform(0.1, 12) if moment == "at any time" else MOST_SECONDS)
    log = story.folder / "metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0
    training = False
    while process.poll() is None and time.monotonic() < until:
        if not training and moment != "at any time" and log.exists() and log.stat().st_size != size:
            training = True
            if moment == "while training":
                until = time.monotonic() + chance.uniform(0, 2)
            else:
                for _ in range(chance.randrange(4)):  # which of the next saves
                    wait_for_save(story, process)
                    wait_for_save(story, process, over=True)
        if training and moment == "while saving":
            wait_for_save(story, process)
            time.sleep(chance.uniform(0, 0.03))
            return
        time.sleep(0.002)


def wait_for_save(story: Story, process: "subprocess.Popen[bytes]", over: bool = False) -> None:
    """Until one is under way, or the one that is has come to its end."""
    while process.poll() is None:
        if any(path.is_dir() for path in (story.folder / "checkpoints").glob("step-*.partial")) != over:
            return
        time.sleep(0.0005)


def relatives(story: Story) -> Iterator[psutil.Process]:
    """All that belongs to a story's run, whoever their parents are by now."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(story.folder) in word for word in words) and process.pid != os.getpid():
            yield process


def victims(process: "subprocess.Popen[bytes]", target: str, chance: random.Random) -> list[psutil.Process]:
    if target == "the command":
        return [psutil.Process(process.pid)]
    with suppressed():
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "bigtune.train" in child.cmdline()]
        launchers = [child for child in workers if "bigtune.launch.workers" in child.cmdline()]
        workers = [child for child in workers if child not in launchers]
        if target == "the launcher" and launchers:
            return launchers
        if workers:
            return workers if target == "all ranks" else [chance.choice(workers)]
    return [psutil.Process(process.pid)]  # nothing else is there yet


def problems(story: Story) -> list[str]:
    """What is wrong with the checkpoint that `latest` names."""
    folder = latest(story.folder / "checkpoints")
    if folder is None:
        return []
    return [str(found) for found in verify(folder).problems]


def compare(story: Story, told: Story) -> dict[str, Any]:
    """How far a story's end is from the run that nobody disturbed: relative, and None where it is the same."""
    mine, others = (metrics(one.folder) for one in (story, told))
    same_rows = [line["tokens"] for line in mine] == [line["tokens"] for line in others] and [
        (line["step"], line["supervised_tokens"], line["epoch"]) for line in mine
    ] == [(line["step"], line["supervised_tokens"], line["epoch"]) for line in others]
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(mine, others, strict=False))
    weights = distance(weights_of(story.folder), weights_of(told.folder))
    return {"worlds": list(story.worlds), "same_rows": same_rows, "loss_apart": losses, "weights_apart": weights}


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights_of(output: Path) -> dict[str, Any]:
    """All parameters of the last checkpoint, put together."""
    folder = latest(output / "checkpoints")
    assert folder is not None
    layout, found = Layout.read(folder), {}
    for group, parameter in layout.parameters():
        values = np.zeros(parameter.numel, dtype=np.float32)
        for piece in layout.ranges(group, parameter):
            place = read_header(rank_file(folder, piece.rank, layout.world_size))[0][f"{group.index}.{MASTER}"]
            part = values[piece.start : piece.start + piece.count]
            read_into(place.path, place.offset + 4 * piece.offset, memoryview(part.view(np.uint8)))
        found[parameter.name] = values
    return found


def distance(mine: dict[str, Any], others: dict[str, Any]) -> float:
    """The largest difference, relative to the parameter's norm a value."""
    assert mine.keys() == others.keys()
    return max(
        float(np.abs(value - others[name]).max() / (np.sqrt(np.square(others[name]).mean()) + 1e-12))
        for name, value in mine.items()
    )


def summary(lines: list[dict[str, Any]], endings: list[dict[str, Any]], steps: int, seed: int) -> dict[str, Any]:
    """The figures. On the ranks that it was trained on before, a run is the same to the last bit; elsewhere within 1e-3
    of the weights' size, since other ranks add up in another order."""
    exact = [ending for ending in endings if ending["worlds"] == [RANKS]]
    differing = [ending for ending in exact if ending["loss_apart"] or ending["weights_apart"]]
    differing += [ending for ending in endings if ending["loss_apart"] > 1e-4 or ending["weights_apart"] > 1e-2]
    differing += [ending for ending in endings if not ending["same_rows"] or ending["code"]]
    return {
        "kills": len(lines),
        "by_target": dict(Counter(line["target"] for line in lines)),
        "by_moment": dict(Counter(line["moment"] for line in lines)),
        "with_a_save_under_way": sum(bool(line["remains"]) for line in lines),
        "by_ranks": dict(Counter(str(line["ranks"]) for line in lines)),
        "came_too_late": sum(line["done"] for line in lines),
        "unusable_checkpoints": sum(bool(line["problems"]) for line in lines),
        "orphans": sum(line["orphans"] for line in lines),
        "slowest_end_seconds": max(line["seconds_to_end"] for line in lines),
        "differing_runs": len(differing),
        "endings": endings,
        "steps": steps,
        "seed": seed,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
