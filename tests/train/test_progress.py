"""A run goes on where it ended: with more epochs, with other documents, and never on nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.data.store import Store
from bigtune.data.stream import RowStream
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import RANKS, differing, metrics, step, train, train_on_rank

GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Documents:
    """Prepared documents, with their rows and tokens in an epoch."""

    settings: dict[str, Any]
    rows: int
    tokens: int

    @property
    def steps(self) -> int:
        return -(-self.rows // GLOBAL_BATCH)


@dataclass(frozen=True)
class House:
    """A model, two sets of documents, and a run of one epoch of the first."""

    folder: Path
    first: Documents
    other: Documents
    run: Run

    def another(self, output: Path, documents: Documents, epochs: int) -> Run:
        return run_of(self.folder, output, documents, epochs)


def run_of(folder: Path, output: Path, documents: Documents, epochs: int) -> Run:
    constant = {"optim__name": "adamw", "optim__schedule": "constant"}  # no step depends on how many there are
    length = {"train__steps": None, "train__epochs": epochs, "train__global_batch": GLOBAL_BATCH}
    return tiny_run(folder, output=str(output), **documents.settings, **constant, **length)


def documents_of(folder: Path, name: str, count: int) -> Documents:
    rows = write_rows(folder / f"{name}.jsonl", count)
    settings = {"data__sources": [{"path": str(rows)}], "data__store": str(folder / name)}
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    stream = RowStream(Store.open(run.store), run.data, run.train.seed, 1)
    return Documents(settings, stream.plan(0)[0].rows, int(stream.pieces.length.sum()))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    tiny_model(folder / "model")
    first, other = documents_of(folder, "first", 19), documents_of(folder, "other", 10)
    assert first.rows % GLOBAL_BATCH == 1 and first.steps == 3 and other.steps == 2
    run = run_of(folder, folder / "run", first, 1)
    train(run)
    return House(folder, first, other, run)


def tokens_after(run: Run, steps: int) -> int:
    return sum(line["tokens"] for line in metrics(run) if line["step"] > steps)


def test_more_epochs_are_learnt_to_their_last_row(house: House, tmp_path: Path) -> None:
    """The last step of an epoch may have one row; the next epoch has all of its own steps all the same."""
    run, steps = house.another(tmp_path / "run", house.first, 2), house.first.steps
    train(run, resume=str(step(house.run, steps)))
    assert [line["step"] for line in metrics(run)] == list(range(steps + 1, 2 * steps + 1))
    assert tokens_after(run, steps) == house.first.tokens == tokens_after(house.run, 0)
    assert metrics(run)[-1]["epoch"] == 2


def test_an_epoch_that_is_over_is_not_skipped_by_new_documents(house: House, tmp_path: Path) -> None:
    run, steps = house.another(tmp_path / "run", house.other, 2), house.first.steps
    train(run, resume=str(step(house.run, steps)), new_data=True)
    assert "epoch 1 begins with them" in (run.output / "logs" / "rank-0.log").read_text()
    assert [line["step"] for line in metrics(run)] == [steps + 1, steps + 2]
    assert tokens_after(run, steps) == house.other.tokens
    assert 1 < metrics(run)[0]["epoch"] < metrics(run)[-1]["epoch"] == 2


@pytest.mark.parametrize("stop_after", [2, 4], ids=["in the first epoch", "in the second"])
def test_an_epoch_that_was_begun_is_given_up_for_new_documents(house: House, tmp_path: Path, stop_after: int) -> None:
    stopped = house.another(tmp_path / "stopped", house.first, 2)
    train(stopped, stop_after=stop_after)
    begun = stop_after // house.first.steps
    run = house.another(tmp_path / "run", house.other, begun + 2)
    train(run, resume=str(step(stopped, stop_after)), new_data=True)
    assert f"epoch {begun + 1} begins with them" in (run.output / "logs" / "rank-0.log").read_text()
    assert f"train: {stop_after + house.other.steps} steps" in (run.output / "logs" / "rank-0.log").read_text()
    assert tokens_after(run, stop_after) == house.other.tokens
    assert [line["supervised_tokens"] > 0 for line in metrics(run)] == [True] * house.other.steps


def test_new_documents_without_an_epoch_left_are_refused_in_one_line(house: House, tmp_path: Path) -> None:
    stopped = house.another(tmp_path / "stopped", house.first, 2)
    train(stopped, stop_after=4)
    run, checkpoint = house.another(tmp_path / "run", house.other, 2), step(stopped, 4)
    messages = run_distributed(train_on_rank, RANKS, run, None, str(checkpoint), True)
    told = f"--new-data: {checkpoint} leaves nothing of epochs: 2 for the new ones; raise train.epochs"
    assert messages == [f"DataError: {told}"] * RANKS
    assert not (run.output / "metrics.jsonl").exists() and not any((run.output / "checkpoints").iterdir())


def test_the_last_step_is_the_same_wherever_the_run_stopped(house: House, tmp_path: Path) -> None:
    run = house.another(tmp_path / "run", house.first, 1)
    train(run, stop_after=2)
    train(run)
    assert metrics(run) == metrics(house.run)
    assert differing(step(run, house.first.steps), step(house.run, house.first.steps)) == []


def too_many(*arguments: Any) -> int:
    return 99


def test_no_step_is_taken_on_nothing(house: House, tmp_path: Path) -> None:
    """Should the rows end before the steps do: Adam and the decay of weights would go on without them."""
    run = house.another(tmp_path / "run", house.first, 1)
    train(run, patches={"bigtune.train.begin.steps_of": too_many})
    assert metrics(run) == metrics(house.run)
    assert differing(step(run, house.first.steps), step(house.run, house.first.steps)) == []
    assert f"train: done, {house.first.steps} steps" in (run.output / "logs" / "rank-0.log").read_text()
