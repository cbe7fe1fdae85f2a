"""Training as a worker does it, in a test's lasting workers, and what a run leaves behind."""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from bigtune.checkpoint.manifest import Manifest
from bigtune.config import Run
from bigtune.dist import World
from bigtune.errors import BigtuneError
from bigtune.tensorfile import read_header, sums_of
from bigtune.train.console import WorkerConsole
from bigtune.train.signals import Requests
from tests.distributed import run_distributed
from tests.tiny import tiny_run

RANKS = 2


SHARE = "bigtune.train.whole.Wholes.of"


def nothing_shared(*_: Any) -> None:
    """In place of `SHARE`: as if each rank were on a host of its own, with DeepSpeed's own collectives."""


def memory(shared: bool) -> AbstractContextManager[Any]:
    """Whether an engine that is built under it finds that ranks share the host's memory."""
    return nullcontext() if shared else mock.patch(SHARE, nothing_shared)


@dataclass(frozen=True)
class Trained:
    """A run that nothing interrupted, and how to make another like it."""

    folder: Path
    settings: dict[str, Any]
    run: Run

    def another(self, output: Path, **changes: Any) -> Run:
        return tiny_run(self.folder, **{**self.settings, "output": str(output), **changes})


class StopAfter(Requests):
    """As if this worker got SIGTERM during a step; `train` asks once a step."""

    def __init__(self, steps: int | None) -> None:
        self._left, self._save = steps, False

    def let_steps_end(self) -> None:
        """This worker is of a test, and takes no signals."""

    @property
    def stop(self) -> bool:  # type: ignore[override]
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0


def train_on_rank(
    run: Run,
    stop_after: int | None = None,
    resume: str | None = None,
    new_data: bool = False,
    patches: Mapping[str, Any] = {},
) -> str:
    """What a worker does, in one of the test's lasting ones.

    Args:
        patches: what stands in this worker for what has such a name, as in `{"bigtune.data.live.SHARDS": 2}`.

    Returns:
        The error that a user would see.
    """
    from bigtune.train.loop import train

    world = World.from_environment()
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        try:
            console = WorkerConsole(run.output, world)
            asked = StopAfter(stop_after if world.rank == world.world_size - 1 else None)  # one rank alone is asked
            train(run, world, resume, asked, console, time.monotonic(), new_data=new_data)
        except BigtuneError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def train(
    run: Run,
    ranks: int = RANKS,
    stop_after: int | None = None,
    resume: str | None = None,
    new_data: bool = False,
    patches: Mapping[str, Any] = {},
    cuda: bool = False,
) -> None:
    """Train on so many ranks; whatever a user would be told is a failure."""
    said = run_distributed(train_on_rank, ranks, run, stop_after, resume, new_data, patches, cuda=cuda)
    assert said == [""] * ranks


def step(run: Run, number: int) -> Path:
    """The folder of a checkpoint."""
    return run.output / "checkpoints" / f"step-{number}"


def metrics(run: Run) -> list[dict[str, Any]]:
    """All of them but what the clock and the memory say."""
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    timing = (
        "time", "step_seconds", "data_seconds", "tokens_per_second", "rank_seconds", "peak_memory_gib", "memory_gib",
        "phase_seconds",
    )  # fmt: skip
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by rank file and name."""
    files = sorted(folder.glob("rank-*.safetensors"))
    assert files
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same to the last bit."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return [
        name
        for name, tensor in first.items()
        if tensor.dtype != second[name].dtype
        or not torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
    ]


def reseal(folder: Path) -> None:
    """Give a checkpoint that a test has edited a manifest that says so, as if it had been saved like that."""
    manifest = Manifest.read(folder)
    sums = {name: sums_of(folder / name) for name in manifest.files}
    Manifest(manifest.id, sums, manifest.disks).write(folder)


def save_rank_file(content: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a rank's file that a test has edited, with the id of its save."""
    _, metadata, _ = read_header(path)
    save_file(dict(content), path, metadata=metadata)
