"""When a run saves, that the training does not wait, and that nothing goes wrong in silence."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bigtune.checkpoint.folder import steps_in
from bigtune.checkpoint.save import save, to_prune
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.host import free_memory
from bigtune.train.staging import Copy, Staging
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import RANKS, Trained, differing, metrics, step, train, train_on_rank

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run that waits for each of its saves."""
    folder = tmp_path_factory.mktemp("saving")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    settings = {
        "train__steps": STEPS, "checkpoint__every_steps": 1, "checkpoint__asynchronous": False,
        "data__store": str(folder / "store"),
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    train(run)
    return Trained(folder, settings, run)


def steps_of(run: Run) -> list[int]:
    return list(steps_in(run.output / "checkpoints"))


def log(run: Run) -> str:
    return (run.output / "logs/rank-0.log").read_text()


def slow_save(*arguments: Any) -> Path:
    """The training is a step or more further before anything is written."""
    time.sleep(0.3)
    return save(*arguments)


SLOW = {"bigtune.train.saving.save": slow_save}


def test_what_is_written_beside_the_training_is_the_step_that_was_asked_for(trained: Trained, tmp_path: Path) -> None:
    """To the last bit, though the optimizer has gone on meanwhile; and the training is that without saves."""
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=3)
    train(run, patches=SLOW)
    assert metrics(run) == metrics(trained.run)
    assert steps_of(run) == [3, 6]
    for number in (3, 6):
        assert differing(step(run, number), step(trained.run, number)) == []


def no_copy(self: Staging, tensors: dict[str, torch.Tensor]) -> Copy:
    return Copy(tensors, None)  # type: ignore[arg-type]


def test_a_run_that_saves_nothing_learns_the_same(trained: Trained, tmp_path: Path) -> None:
    """Its last step's line is written all the same."""
    run = trained.another(tmp_path / "run", checkpoint__enabled=False)
    train(run)
    assert metrics(run) == metrics(trained.run)
    assert steps_of(run) == []


def test_without_the_copy_another_step_would_be_written(trained: Trained, tmp_path: Path) -> None:
    """The mutation: the optimizer changes what is being saved."""
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=3)
    train(run, patches={**SLOW, "bigtune.train.staging.Staging.copy": no_copy})
    assert differing(step(run, 3), step(trained.run, 3)) != []


def test_the_step_does_not_wait_for_the_writer(trained: Trained, tmp_path: Path) -> None:
    """By the order of events: step 4 is done before step 3 is there."""
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=3, train__steps=5)
    order = run_distributed(order_on_rank, RANKS, run)
    assert order[0].index("learnt 4") < order[0].index("saved 3")
    waiting = run.model_copy(
        update={"output": tmp_path / "waiting", "checkpoint": run.checkpoint.model_copy(update={"asynchronous": False})}
    )
    order = run_distributed(order_on_rank, RANKS, waiting)
    assert order[0].index("learnt 4") > order[0].index("saved 3")


def order_on_rank(run: Run) -> list[str]:
    from bigtune.train import loop

    events: list[str] = []

    def noted_save(*arguments: Any) -> Path:
        folder = slow_save(*arguments)
        events.append(f"saved {arguments[1]}")
        return folder

    def noted_learn(*arguments: Any) -> Any:
        found = learn(*arguments)
        events.append(f"learnt {arguments[-1][1] + 1}")
        return found

    learn = loop._learn
    patches = {"bigtune.train.saving.save": noted_save, "bigtune.train.loop._learn": noted_learn}
    assert train_on_rank(run, patches=patches) == ""
    return events


def broken_save(*arguments: Any) -> Path:
    raise OSError("no such luck")


def failing_write(path: Path, *arguments: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_save_that_fails_beside_the_training_ends_it_at_the_next_step(
    trained: Trained, tmp_path: Path, failing_rank: int
) -> None:
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=2, train__steps=100)
    said = run_distributed(fail_on_rank, RANKS, run, failing_rank)
    assert said[0] == said[1]
    assert f"could not be saved (rank {failing_rank}: [Errno 28] No space left on device; " in said[0]
    lines = metrics(run)
    assert 2 <= lines[-1]["step"] < 30
    assert steps_of(run) == []
    assert not list((run.output / "checkpoints").glob("*.partial"))


def fail_on_rank(run: Run, failing_rank: int) -> str:
    mine = int(os.environ["RANK"]) == failing_rank
    writers = ("bigtune.checkpoint.save.write", "bigtune.checkpoint.save.write_image")
    return train_on_rank(run, patches=dict.fromkeys(writers, failing_write) if mine else {})


def test_a_failure_in_the_last_save_is_told_too(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=None, train__steps=1)
    said = run_distributed(fail_on_rank, RANKS, run, 1)
    assert all("could not be saved (rank 1: " in text for text in said)


def test_a_bug_in_the_writer_is_raised_as_one(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=2)
    (said, _) = run_distributed(raise_on_rank, RANKS, run)
    assert said == "no such luck"


def raise_on_rank(run: Run) -> str:
    try:
        return train_on_rank(run, patches={"bigtune.train.saving.save": broken_save})
    except OSError as error:
        return str(error)


def hardly_any_memory() -> int:
    return 1000


def test_where_a_copy_has_no_room_the_training_waits_and_says_so(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__asynchronous=True, checkpoint__every_steps=2)
    train(run, patches={"bigtune.train.staging.free_memory": hardly_any_memory})
    assert log(run).count("the training waits for each save: there is no memory for a copy of 0.00 GiB a rank") == 1
    assert steps_of(run) == [2, 4, 6]
    assert differing(step(run, 4), step(trained.run, 4)) == []


def test_the_memory_of_a_copy_is_used_again() -> None:
    place, tensors = Staging(), {"a": torch.arange(5.0), "b": torch.arange(4, dtype=torch.uint8)}
    first = place.copy(tensors).tensors
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors.items())
    tensors["a"] += 1
    second = place.copy({**tensors, "b": torch.arange(3, dtype=torch.uint8)})
    assert first["a"].data_ptr() == second.tensors["a"].data_ptr()
    assert second.tensors["a"].tolist() == [1, 2, 3, 4, 5]
    assert bytes(second.image[20:23]) == b"\0\1\2"
    assert len(place.copy({"b": torch.zeros(10**6)}).tensors["b"]) == 10**6


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\nactive_file 10000\n")
    assert free_memory(tmp_path) == 360_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 2**20
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5})())
    assert free_memory(tmp_path) == 5


# ------------------------------------------------------------------------------------ when, and what is kept


def asked_on_rank(run: Run, how: str) -> str:
    """Ask during the third step, on the last rank, or by a file."""
    from bigtune.train import loop
    from bigtune.train.signals import Requests

    learn = loop._learn

    def asking(*arguments: Any) -> Any:
        if arguments[-1][1] == 2:
            if how == "file":
                (run.output / "save").touch()
            elif int(os.environ["RANK"]) == RANKS - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return learn(*arguments)

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    requests = Requests()
    try:
        return train_on_rank(
            run, patches={"bigtune.train.loop._learn": asking, "tests.training.StopAfter": lambda _: requests}
        )
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_save_is_made_when_asked_for_and_the_run_goes_on(trained: Trained, tmp_path: Path, how: str) -> None:
    run = trained.another(tmp_path / "run", checkpoint__every_steps=None)
    assert run_distributed(asked_on_rank, RANKS, run, how) == [""] * RANKS
    assert steps_of(run) == [4, 6]  # during step 3 it was asked for, at the end of step 4 it was done
    assert not (run.output / "save").exists()
    assert metrics(run) == metrics(trained.run)


def test_saves_come_by_the_clock(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__every_steps=None, checkpoint__every_minutes=1e-6)
    train(run)
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    run = trained.another(tmp_path / "other", checkpoint__every_steps=None, checkpoint__every_minutes=60.0)
    train(run)
    assert steps_of(run) == [6]


def test_before_its_time_limit_a_run_saves_and_leaves(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(
        tmp_path / "run", checkpoint__every_steps=None, train__time_limit_minutes=0.6, train__steps=100_000
    )
    began = time.monotonic()
    train(run)  # 36 s, less 30 to spare
    assert time.monotonic() - began < 36
    (last,) = steps_of(run)
    assert 0 < last < 100_000
    assert f"train: stopped at step {last} of 100000; the same command goes on from there" in log(run)


def test_the_newest_every_nth_and_the_best_are_kept() -> None:
    steps = [10, 20, 30, 40, 50, 60, 70]
    assert to_prune(steps, 60, None, None, None) == []
    assert to_prune(steps, 60, 2, None, None) == [10, 20, 30, 40]  # 70 is of a run that went back
    assert to_prune(steps, 60, 2, 20, None) == [10, 30]
    assert to_prune(steps, 60, 2, 20, 30) == [10]
    assert to_prune([60], 60, 1, None, None) == []


def test_what_is_not_kept_is_removed(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__keep_last=2, checkpoint__keep_every=3)
    train(run)
    assert steps_of(run) == [3, 5, 6]
