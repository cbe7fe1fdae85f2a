"""A step that is not finite on one rank changes nothing on any; a hang, a drift and a straggler are told."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import bigtune
from bigtune.config import Run
from bigtune.data.collate import collate
from bigtune.data.loader import step_of
from bigtune.data.rows import Position
from bigtune.data.store import Store
from bigtune.data.stream import RowStream
from bigtune.dist import World
from bigtune.model.head import LossHead
from bigtune.runfile import to_yaml
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_run
from tests.train.test_loss import ALIKE
from tests.training import SHARE, metrics, nothing_shared, train, train_on_rank

NAN, INF = float("nan"), float("inf")

# What goes wrong on the last rank, in the loss that its model gives.
POISONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan loss": lambda loss: loss * NAN,
    "inf loss": lambda loss: loss * INF,
    "nan loss of finite gradient": lambda loss: loss + NAN,
    "nan gradient of finite loss": lambda loss: _with_gradient(loss, NAN),
    "inf gradient of finite loss": lambda loss: _with_gradient(loss, INF),
}


def _with_gradient(loss: torch.Tensor, times: float) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * times)
    return loss


# ------------------------------------------------------------------------------------------------ the engine


def unchanged_by(folder: Path, precision: str, preset: str, max_grad_norm: float, guarded: bool) -> dict[str, bool]:
    """On each rank: by poison, whether a step with it leaves all there is as it was, to the last bit.

    DeepSpeed's own look at the norm is off, so that the guard alone answers for it.
    """
    world = World.from_environment()
    run = tiny_run(folder, optim__max_grad_norm=max_grad_norm)
    off: Any = {} if guarded else {"side_effect": lambda zero: None}
    with (
        mock.patch("deepspeed.runtime.zero.stage3.is_invalid_grad_norm", lambda norm: False),
        mock.patch("deepspeed.runtime.zero.stage_1_and_2.is_invalid_grad_norm", lambda norm: False),
        mock.patch(
            "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.check_overflow", lambda zero, **_: None
        ),
        mock.patch(f"bigtune.train.{preset[:5]}.refuse_non_finite", **off) if not guarded else _as_is(),
    ):
        engine = Engine(folder, run.optim, complete(read_preset(preset), run, precision, 36), precision, world)
        assert step(engine, world, None)
        found = {}
        for name in POISONS:
            before = everything(engine)
            applied = step(engine, world, name)
            found[name] = not applied and same(before, everything(engine))
            if not guarded:
                return found
        before = everything(engine)
        assert step(engine, world, None)
        assert not same(before, everything(engine))  # the comparison sees a step
        assert engine.grad_norm < INF
    return found


@contextmanager
def _as_is() -> Iterator[None]:
    yield


def step(engine: Engine, world: World, poison: str | None) -> bool:
    """A step of two micro-steps a rank; the poison is in the first of the last rank."""
    for index in range(2):
        poisoned = poison is not None and index == 0 and world.rank == world.world_size - 1
        module = engine._engine.module
        change = POISONS[poison] if poisoned and poison else lambda loss: loss
        hook = module.register_forward_hook(lambda _, __, losses, change=change: (change(losses[0]), *losses[1:]))
        engine.micro_step(collate([ALIKE[(2 * index + world.rank) % len(ALIKE)]]), 48.0, 204, last=index == 1)
        hook.remove()
    return engine.step(1e-2)


def everything(engine: Engine) -> list[torch.Tensor]:
    """Copies of this rank's masters, optimizer states, partitions and the learning of the step count."""
    tensors = []
    for part in engine.partitions():
        states = [torch.as_tensor(value) for value in part.state.values()]
        tensors += [part.master, *states]
    tensors += [getattr(parameter, "ds_tensor", parameter.data) for parameter in engine.parameters.values()]
    return [tensor.detach().clone() for tensor in tensors]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("preset", ["zero3", "zero3_offload", "zero2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(
    folder: Path, precision: str, preset: str, max_grad_norm: float
) -> None:
    for found in run_distributed(unchanged_by, 2, folder, precision, preset, max_grad_norm, True):
        assert found == dict.fromkeys(POISONS, True)


@pytest.mark.parametrize("preset", ["zero3", "zero2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_the_guard_it_would(folder: Path, precision: str, preset: str) -> None:
    """The mutation: DeepSpeed's own look is off in both."""
    for found in run_distributed(unchanged_by, 2, folder, precision, preset, 1.0, False):
        assert not any(found.values())


# --------------------------------------------------------------------------------------------------- a run

REAL_FORWARD, REAL_STEP = LossHead.forward, Engine.step


def on_last_rank() -> bool:
    return os.environ.get("RANK") == "1"


def broken_forward(head: LossHead, hidden: torch.Tensor, *rest: Any) -> Any:
    return REAL_FORWARD(head, hidden * NAN if on_last_rank() else hidden, *rest)


def slow_forward(head: LossHead, *inputs: Any) -> Any:
    if on_last_rank():
        time.sleep(0.3)
    return REAL_FORWARD(head, *inputs)


def drifting_step(engine: Engine, rate: float) -> bool:
    applied = REAL_STEP(engine, rate)
    if on_last_rank():
        engine.replicas()["parameters"][0].view(-1)[3] += 1e-6
    return applied


def other_yaml(run: Run) -> str:
    return to_yaml(run) + ("# another\n" if on_last_rank() else "")


def another(made: Path, output: Path, **changes: Any) -> Run:
    return tiny_run(made, **{"data__store": str(made / "store"), "output": str(output / "run"), **changes})


def test_a_run_stops_after_so_many_such_steps_and_names_the_rows(made: Path, tmp_path: Path) -> None:
    run = another(made, tmp_path, train__max_skipped_steps=2, optim__name="adamw")
    patches = {"bigtune.model.head.LossHead.forward": broken_forward}
    messages = run_distributed(train_on_rank, 2, run, None, None, False, patches)
    assert messages[0] == messages[1]
    assert messages[0].startswith("TrainError: step 2: 2 steps in a row were skipped since a loss or gradient was not ")
    assert "\n" not in messages[0]
    rows = RowStream(Store.open(run.store), run.data, run.train.seed, None)
    second, after = rows.take(Position(0, 4), 4)
    mine = step_of(second, after, World(1, 2), 1, 4).rows
    (told,) = re.findall(r"rank 1's loss of (.*?); look", messages[0])
    assert set(told.split(" + ")) == {place for part in mine for row in part for place in rows.where(row)}
    assert "rank 0's" not in messages[0]
    assert [(line["step"], line["skipped"], line["loss"]) for line in metrics(run)] == [
        (1, True, None),
        (2, True, None),
    ]
    assert not any((run.output / "checkpoints").iterdir())
    assert "step 1: a loss of nan from" in (run.output / "logs" / "rank-1.log").read_text()


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_it(made: Path, tmp_path: Path) -> None:
    run = another(made, tmp_path, train__max_skipped_steps=2, optim__name="adamw")
    train(run, patches={"bigtune.model.head.LossHead.forward": broken_at_times})
    assert [line["skipped"] for line in metrics(run)] == [True, False, True, False, True, False]
    trainer = json.loads((run.output / "checkpoints" / "step-6" / "trainer.json").read_text())
    assert trainer["skipped_steps"] == 3


calls = 0


def broken_at_times(head: LossHead, hidden: torch.Tensor, *rest: Any) -> Any:
    """In every other step; a step has two micro-steps on each of two ranks."""
    global calls
    calls += 1
    return REAL_FORWARD(head, hidden * INF if on_last_rank() and calls % 4 == 1 else hidden, *rest)


def test_a_straggler_shows_in_the_metrics(made: Path, tmp_path: Path) -> None:
    run = another(made, tmp_path, train__steps=3, optim__name="adamw")
    train(run, patches={"bigtune.model.head.LossHead.forward": slow_forward})
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        seconds = line["rank_seconds"]
        assert seconds["slowest_rank"] == 1
        assert seconds["most"] > 0.6 > seconds["least"] > 0  # it sleeps in both of its micro-steps


@pytest.mark.parametrize(
    ("name", "patch", "what"),
    [
        ("bigtune.train.engine.Engine.step", drifting_step, "parameters"),
        ("bigtune.train.saving.to_yaml", other_yaml, "run.yaml"),
    ],
    ids=["a parameter", "the run file"],
)
def test_ranks_that_have_drifted_apart_are_not_saved(
    made: Path, tmp_path: Path, name: str, patch: Callable[..., Any], what: str
) -> None:
    run = another(made, tmp_path, train__steps=2, optim__name="adamw")
    patches = {name: patch, SHARE: nothing_shared}  # what is shared cannot differ
    messages = run_distributed(train_on_rank, 2, run, None, None, False, patches)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        f"CheckpointError: {run.output / 'checkpoints' / 'step-2'}: not saved, the ranks have"
    )
    assert f"other than on most are {what} of rank 1; look" in messages[0]
    assert not any((run.output / "checkpoints").iterdir())


HANG = """
import os, time
if os.environ.get("RANK") == "1":
    from bigtune.data.loader import Loader
    real, calls = Loader.next, []
    def hanging_next(self):
        calls.append(None)
        time.sleep(600 if len(calls) == 3 else 0)
        return real(self)
    Loader.next = hanging_next
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
@pytest.mark.slow
def test_a_step_that_hangs_ends_the_run_with_the_stacks_of_all_ranks(made: Path, tmp_path: Path) -> None:
    """Through the command line: one rank sleeps, the other waits for it in a collective of gloo."""
    (tmp_path / "sitecustomize.py").write_text(HANG)
    run = another(made, tmp_path, train__step_timeout_seconds=5.0, optim__name="adamw")
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    command = [sys.executable, "-m", "bigtune.cli", "train", str(tmp_path / "run.yaml"), "--ranks", "2"]
    path = os.pathsep.join((str(tmp_path), str(Path(bigtune.__file__).parents[1])))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: rank 1: step 3 took longer than train.step_timeout_seconds (5); this rank was "), (
        done.stderr
    )
    assert "hanging_next" in last
    assert f"the stacks of all ranks are in {run.output / 'logs'}/rank-N.log" in last
    assert "Traceback" not in done.stdout + done.stderr
    stacks = [(run.output / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert all("most recent call first" in text for text in stacks)
    assert "in reduce_totals" in stacks[0]
    assert "in hanging_next" in stacks[1]
