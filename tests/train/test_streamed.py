"""A run on `data.stream: true` goes on as a prepared one does: to the last bit, and in its rows on any ranks."""

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigtune.config import Run
from bigtune.data.pool import Pool, open_pool
from bigtune.data.recipe import Recipe
from bigtune.errors import DataError
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import RANKS, differing, metrics, reseal, step, train, train_on_rank

STEPS, STOP_AFTER = 12, 6
WINDOWS = {  # so small that few rows have several shards of several windows
    "bigtune.data.live.BLOCK_BYTES": 512, "bigtune.data.live.WINDOW_BYTES": 900,
    "bigtune.data.live.ROWS_A_WINDOW": 1, "bigtune.data.live.WINDOWS_A_SHARD": 2,
}  # fmt: skip


def in_this_process(workers: int, recipe: Recipe) -> AbstractContextManager[Pool]:
    return open_pool(0, recipe)


def nothing(*arguments: Any) -> None:
    return None


QUICK = {**WINDOWS, "bigtune.data.live.open_pool": in_this_process}


@dataclass(frozen=True)
class Trained:
    """A run that nothing interrupted, and how to make another like it."""

    folder: Path
    run: Run

    def another(self, output: Path, **changes: Any) -> Run:
        return run_of(self.folder, output, **changes)


def run_of(folder: Path, output: Path, **changes: Any) -> Run:
    settings = {"data__stream": True, "data__workers": 1, "train__steps": STEPS, "train__global_batch": 3}
    return tiny_run(folder, output=str(output), **{**settings, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("streamed")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    run = run_of(folder, folder / "run", checkpoint__every_steps=STOP_AFTER)
    train(run, patches=QUICK)
    return Trained(folder, run)


def data_of(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / "data.json").read_text())
    return content


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(trained: Trained, tmp_path: Path) -> None:
    """The one that stopped has worker processes, as a user's has; the other makes its rows itself."""
    run = trained.another(tmp_path / "stopped")
    train(run, stop_after=STOP_AFTER, patches=WINDOWS)
    data = data_of(step(run, STOP_AFTER))
    assert data["epoch"] == 0 and min(data["shard"], data["window"], data["row"]) > 0
    assert differing(step(run, STOP_AFTER), step(trained.run, STOP_AFTER)) == []
    train(run, patches=WINDOWS)
    assert metrics(run) == metrics(trained.run)
    assert differing(step(run, STEPS), step(trained.run, STEPS)) == []
    assert differing(step(run, STEPS), step(run, STOP_AFTER)) != []  # the comparison sees training
    assert data_of(step(run, STEPS)) == data_of(step(trained.run, STEPS))
    assert data_of(step(run, STEPS))["epoch"] == 1  # it crossed one


@pytest.mark.parametrize("number", ["row", "window", "shard"])
def test_another_position_would_be_seen(trained: Trained, tmp_path: Path, number: str) -> None:
    """The mutation: otherwise the equality might hold because the position does not matter."""
    shutil.copytree(trained.run.output, tmp_path / "run")
    run = trained.another(tmp_path / "run", train__steps=STOP_AFTER + 1)
    checkpoint = step(run, STOP_AFTER)
    data = data_of(checkpoint)
    (checkpoint / "data.json").write_text(json.dumps({**data, number: data[number] - 1}))
    reseal(checkpoint)
    train(run, resume=f"step-{STOP_AFTER}", patches=QUICK)
    assert metrics(run)[STOP_AFTER] != metrics(trained.run)[STOP_AFTER]


def test_the_rows_go_on_on_another_number_of_ranks(trained: Trained, tmp_path: Path) -> None:
    """The shards are of two ranks and stay unread here; what is asked is which rows a step has."""
    run = trained.another(tmp_path / "one")
    without_state = {**QUICK, "bigtune.train.begin.restore": nothing, "bigtune.train.begin.check": nothing}
    train(run, ranks=1, resume=str(step(trained.run, STOP_AFTER)), patches=without_state)
    assert rows_of(run) == rows_of(trained.run)[STOP_AFTER:]
    assert data_of(step(run, STEPS)) == data_of(step(trained.run, STEPS))


def rows_of(run: Run) -> list[tuple[Any, ...]]:
    """What metrics tell of a step's rows."""
    return [tuple(line[key] for key in ("step", "epoch", "tokens", "supervised_tokens")) for line in metrics(run)]


def test_new_data_begins_with_the_next_epoch(trained: Trained, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=41)
    run = trained.another(tmp_path / "run", data__sources=[{"path": str(rows)}], train__steps=STOP_AFTER + 1)
    checkpoint = step(trained.run, STOP_AFTER)
    messages = run_distributed(train_on_rank, RANKS, run, None, str(checkpoint), False, QUICK)
    assert all("was trained on other rows" in message for message in messages)
    train(run, resume=str(checkpoint), new_data=True, patches=QUICK)
    assert metrics(run)[0]["epoch"] == 1
    data = data_of(step(run, STOP_AFTER + 1))
    assert (data["epoch"], data["shard"], data["window"], data["row"]) == (1, 0, 0, 3)


def broken(*arguments: Any) -> float:
    raise DataError("rows.jsonl: gone")


def error_and_children(run: Run, patches: dict[str, Any]) -> tuple[str, list[str]]:
    said = train_on_rank(run, patches=patches)
    alive = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    return said, [command for command in alive if "popen_loky" in command]


def test_an_error_in_the_loop_leaves_no_process(trained: Trained, tmp_path: Path) -> None:
    patches = {**WINDOWS, "bigtune.train.loop.learning_rate": broken}
    found = run_distributed(error_and_children, RANKS, trained.another(tmp_path / "run"), patches)
    assert found == [("DataError: rows.jsonl: gone", [])] * RANKS
