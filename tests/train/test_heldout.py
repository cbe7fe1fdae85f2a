"""The loss of held-out rows during training: that of the model as it is then, on any number of ranks."""

import json
import math
import os
from pathlib import Path

import pytest

from bigtune import api
from bigtune.checkpoint.folder import read_json, steps_in
from bigtune.checkpoint.merge import merge
from bigtune.config import Run
from bigtune.data.heldout import packed_held_out
from bigtune.data.prepare import prepare
from bigtune.errors import DataError
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import RANKS, Trained, metrics, step, train, train_on_rank

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Held out are rows of other lengths, an odd number of them when packed."""
    folder = tmp_path_factory.mktemp("heldout")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "held.jsonl", count=11)
    settings = {
        "train__steps": STEPS, "checkpoint__every_steps": 2, "data__store": str(folder / "store"),
        "optim__name": "adamw",
        "checkpoint__keep_last": 4, "checkpoint__keep_best": True,
        "data__on_long_document": "truncate",
        "data__sequence_length": 160,
        "evaluate": {"sources": [{"path": str(folder / "held.jsonl")}], "max_new_tokens": 4},
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    train(run)
    return Trained(folder, settings, run)


def held_out_losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line}


def test_it_is_the_loss_that_evaluate_finds_for_the_merged_model(trained: Trained, tmp_path: Path) -> None:
    found = held_out_losses(trained.run)
    assert list(found) == [2, 4]
    for number, loss in found.items():
        assert read_json(step(trained.run, number), "trainer.json")["held_out_loss"] == loss
        model = merge(step(trained.run, number), tmp_path / str(number))
        wanted = api.evaluate(trained.run, model).overall.held_out_loss.mean
        assert wanted is not None
        assert math.isclose(loss, wanted, rel_tol=1e-4)
    assert found[2] != found[4]


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_the_same_on_any_number_of_ranks(trained: Trained, tmp_path: Path, ranks: int) -> None:
    """Unequal numbers of rows among them."""
    rows = packed_held_out(trained.run, trained.run.model.path)
    assert len(rows) % 2 == 1
    run = trained.another(tmp_path / "run", train__micro_batch=ranks)
    train(run, ranks=ranks)
    for number, loss in held_out_losses(run).items():
        assert math.isclose(loss, held_out_losses(trained.run)[number], rel_tol=1e-5)


def test_looking_changes_nothing_that_is_trained(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__keep_best=False)
    train(run)
    without = [{key: value for key, value in line.items() if key != "held_out_loss"} for line in metrics(trained.run)]
    assert metrics(run) == without


LOSSES = [5.0, 3.0, 4.0, 3.5, 6.0]


def scripted_on_rank(run: Run) -> str:
    losses = iter(LOSSES)
    return train_on_rank(run, patches={"bigtune.train.saving.held_out_loss": lambda *_: next(losses)})


def test_the_best_is_kept(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "run", checkpoint__every_steps=1, checkpoint__keep_last=1, train__steps=5)
    assert run_distributed(scripted_on_rank, RANKS, run) == ["", ""]
    assert list(steps_in(run.output / "checkpoints")) == [2, 5]
    assert read_json(step(run, 2), "trainer.json")["held_out_loss"] == 3.0


def test_rows_that_were_held_out_of_the_sources_are_those(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    run = tiny_run(tmp_path, data__holdout=7, data__sequence_length=160)
    prepare(run.data, run.model.path, run.store)
    rows = packed_held_out(run, run.model.path)
    assert sum(len(row.documents) for row in rows) == 7
    assert all(row.tokens <= 160 for row in rows)
    assert [row.work for row in rows] == sorted((row.work for row in rows), reverse=True)


def test_rows_without_an_answer_are_told(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + os.linesep)
    run = tiny_run(tmp_path, evaluate={"sources": [{"path": str(tmp_path / "held.jsonl")}]})
    with pytest.raises(DataError):
        packed_held_out(run, run.model.path)
