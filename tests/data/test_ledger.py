"""The ledger: runs that are killed at random and go on with other numbers of ranks learn each document once an epoch.

Each rank is a process of its own that writes down which documents its micro-batches held, and after each step the
position. All are killed with SIGKILL at a random moment; the next run starts at the last step that every rank has
finished, as a checkpoint would, and forgets what came after.
"""

import itertools
import json
import multiprocessing
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Data, TrainingSource
from bigtune.data import live, loader, prepare
from bigtune.data.deal import EMPTY, deal
from bigtune.data.live import LiveRows
from bigtune.data.loader import Loader
from bigtune.data.pool import open_pool
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Position, Row
from bigtune.data.store import Store
from bigtune.data.stream import RowStream
from bigtune.dist import World

DOCUMENTS, EPOCHS, GLOBAL_BATCH = 900, 2, 6
WORLDS = (2, 3, 1, 4)


def consume(
    folder: Path, data: Data, recipe: Recipe, world: World, start: Position, step: int, mutation: str | None
) -> None:
    """What a rank does of a run, but for the model."""
    rows: Any
    if data.stream:
        live.BLOCK_BYTES, live.WINDOW_BYTES, live.ROWS_A_WINDOW = 2048, 8192, 1
        opened = open_pool
        vars(live)["open_pool"] = lambda workers, recipe: opened(0, recipe)
        rows = _Bounded(LiveRows(data, recipe, seed=7))
    else:
        rows = RowStream(Store.open(folder / "store"), data, seed=7, epochs=EPOCHS)
    if mutation:
        MUTATIONS[mutation](rows)
    decode = _decoder(recipe)
    with Loader(rows, start, world, 1, GLOBAL_BATCH) as batches, (folder / f"rank-{world.rank}").open("a") as ledger:
        position = start
        while position.epoch < EPOCHS:
            taken = batches.next()
            step += 1
            documents = []
            for batch in taken.batches:
                edges = batch.document_offsets.tolist()
                for a, b in itertools.pairwise(edges):
                    if batch.tokens:
                        documents.append(int(re.findall(r"Number (\d+)\?", decode(batch.input_ids[a:b]))[0]))
            position = taken.after
            ledger.write(json.dumps({"step": step, "documents": documents, "after": position.to_json()}) + "\n")
            ledger.flush()
            time.sleep(0.002)  # a step of training


class _Bounded:
    """A stream that ends after some epochs, as a prepared one does."""

    def __init__(self, rows: LiveRows) -> None:
        self.rows = rows

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        taken: list[Row] = []
        while len(taken) < count and position.epoch < EPOCHS:
            some, position = self.rows.take(position, 1)
            taken += some if position.epoch < EPOCHS else []
        return taken, position


def _drop_a_row(rows: Any) -> None:
    """The first row of a batch is dealt to no rank."""

    def dropping(*arguments: Any) -> Any:
        slots = deal(*arguments)
        if next(calls) == MUTATED:
            slots[slots == 0] = EMPTY
        return slots

    calls = itertools.count()
    vars(loader)["deal"] = dropping


def _skip_a_row(rows: Any) -> None:
    _take_otherwise(rows, lambda take, position, count: _without_first(*take(position, count + 1)))


def _repeat_a_row(rows: Any) -> None:
    _take_otherwise(rows, lambda take, position, count: _first_again(*take(position, count - 1)))


def _without_first(rows: list[Row], after: Position) -> tuple[list[Row], Position]:
    return rows[1:], after


def _first_again(rows: list[Row], after: Position) -> tuple[list[Row], Position]:
    return [rows[0], *rows], after


def _take_otherwise(rows: Any, otherwise: Callable[..., tuple[list[Row], Position]]) -> None:
    """One batch is taken in another way."""

    def taking(position: Position, count: int) -> tuple[list[Row], Position]:
        return otherwise(take, position, count) if next(calls) == MUTATED else take(position, count)

    calls, take = itertools.count(), rows.take
    rows.take = taking


MUTATED = 3
"""The batch of a process that a mutation is for."""
MUTATIONS: dict[str, Callable[[Any], None]] = {"drop": _drop_a_row, "skip": _skip_a_row, "repeat": _repeat_a_row}
"""What a run may do wrong, in every process of it; called with the process's rows."""


def _decoder(recipe: Recipe) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.chat.tokenizer_json)
    return lambda ids: tokenizer.decode(ids.tolist())


def lines(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"rank-{rank}"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]  # a kill may cut the last one


@dataclass(frozen=True)
class Ledger:
    """What the ranks of a run wrote down: how often each document was learnt, and the numbers of ranks in turn."""

    learnt: Counter[int]
    worlds: list[int]


EXACT = Counter(dict.fromkeys(range(DOCUMENTS), EPOCHS))


def run_ledger(folder: Path, model_path: Path, streamed: bool, kills: int, mutation: str | None = None) -> Ledger:
    """A whole run, killed so often, each time with another number of ranks."""
    rows = [{"question": f"Number {i}?", "answer": "four " * (1 + i % 19)} for i in range(DOCUMENTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(sources=(TrainingSource(path=folder / "rows.jsonl"),), sequence_length=64, stream=streamed)
    if not streamed:
        prepare.prepare(data, model_path, folder / "store")
    recipe = Recipe.of(data, model_path, ())
    random.seed(1)
    ledger = Ledger(Counter(), [])
    position, step = Position(), 0
    while position.epoch < EPOCHS:
        size = WORLDS[len(ledger.worlds) % len(WORLDS)]
        kill_after = random.randint(2, 12) if len(ledger.worlds) < kills else 10**6
        ledger.worlds.append(size)
        done = run_until(kill_after, folder, size, (data, recipe), (position, step, mutation))
        last = min(len(of_rank) for of_rank in done)
        for of_rank in done:
            ledger.learnt.update(document for line in of_rank[:last] for document in line["documents"])
            assert [line["after"] for line in of_rank[:last]] == [line["after"] for line in done[0][:last]]
        if last:
            position, step = Position.from_json(done[0][last - 1]["after"]), done[0][last - 1]["step"]
    return ledger


def run_until(
    kill_after: int, folder: Path, size: int, what: tuple[Data, Recipe], start: tuple[Position, int, str | None]
) -> list[list[dict[str, Any]]]:
    """Run so many ranks to the end of the last epoch, or kill them after some steps; the lines that each wrote."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=consume, args=(folder, *what, World(rank, size), *start)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks) and len(lines(folder, size - 1)) < kill_after:
        time.sleep(0.005)
    codes = []
    for rank in ranks:
        rank.kill()
        rank.join()
        codes.append(rank.exitcode)
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    done = [lines(folder, rank) for rank in range(size)]
    for path in folder.glob("rank-*"):
        path.unlink()
    return done


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["prepared", "streamed"])
def test_each_document_is_learnt_once_an_epoch_whatever_happens(
    streamed: bool, model_path: Path, tmp_path: Path
) -> None:
    ledger = run_ledger(tmp_path, model_path, streamed, kills=2 * len(WORLDS))
    assert len(ledger.worlds) > len(WORLDS), "it was not killed often enough"
    assert ledger.learnt == EXACT


@pytest.mark.parametrize(("mutation", "wrong"), [("drop", -1), ("skip", -1), ("repeat", 1)])
def test_one_row_that_is_lost_or_learnt_twice_would_be_seen(
    mutation: str, wrong: int, model_path: Path, tmp_path: Path
) -> None:
    ledger = run_ledger(tmp_path, model_path, streamed=False, kills=0, mutation=mutation)
    assert ledger.learnt != EXACT
    differences = {i: ledger.learnt[i] - EPOCHS for i in range(DOCUMENTS) if ledger.learnt[i] != EPOCHS}
    assert set(differences.values()) == {wrong} and len(differences) < 32  # one row of 64 tokens, and no more
