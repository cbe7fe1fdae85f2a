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
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Data, TrainingSource
from bigtune.data import live, prepare
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


def consume(folder: Path, data: Data, recipe: Recipe, world: World, start: Position, step: int) -> None:
    """What a rank does of a run, but for the model."""
    rows: Any
    if data.stream:
        live.BLOCK_BYTES, live.WINDOW_BYTES, live.ROWS_A_WINDOW = 2048, 8192, 1
        opened = open_pool
        vars(live)["open_pool"] = lambda workers, recipe: opened(0, recipe)
        rows = _Bounded(LiveRows(data, recipe, seed=7))
    else:
        rows = RowStream(Store.open(folder / "store"), data, seed=7, epochs=EPOCHS)
    decode = _decoder(recipe)
    with Loader(rows, start, world, 1, GLOBAL_BATCH) as loader, (folder / f"rank-{world.rank}").open("a") as ledger:
        position = start
        while position.epoch < EPOCHS:
            taken = loader.next()
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


def _decoder(recipe: Recipe) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.chat.tokenizer_json)
    return lambda ids: tokenizer.decode(ids.tolist())


def lines(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"rank-{rank}"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]  # a kill may cut the last one


@pytest.mark.parametrize("streamed", [False, True], ids=["prepared", "streamed"])
def test_each_document_is_learnt_once_an_epoch_whatever_happens(
    streamed: bool, model_path: Path, tmp_path: Path
) -> None:
    rows = [{"question": f"Number {i}?", "answer": "four " * (1 + i % 19)} for i in range(DOCUMENTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(sources=(TrainingSource(path=tmp_path / "rows.jsonl"),), sequence_length=64, stream=streamed)
    if not streamed:
        prepare.prepare(data, model_path, tmp_path / "store")
    recipe = Recipe.of(data, model_path, ())
    random.seed(1)
    context = multiprocessing.get_context("spawn")
    learnt: Counter[int] = Counter()
    position, step = Position(), 0
    worlds: list[int] = []
    while position.epoch < EPOCHS:
        size = WORLDS[len(worlds) % len(WORLDS)]
        kill_after = random.randint(2, 12) if len(worlds) < 2 * len(WORLDS) else 10**6
        worlds.append(size)
        ranks = [
            context.Process(target=consume, args=(tmp_path, data, recipe, World(rank, size), position, step))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks) and len(lines(tmp_path, size - 1)) < kill_after:
            time.sleep(0.005)
        codes = []
        for rank in ranks:
            rank.kill()
            rank.join()
            codes.append(rank.exitcode)
        assert set(codes) <= {0, -signal.SIGKILL}, codes
        done = [lines(tmp_path, rank) for rank in range(size)]
        last = min(len(of_rank) for of_rank in done)
        for of_rank in done:
            learnt.update(document for line in of_rank[:last] for document in line["documents"])
            assert [line["after"] for line in of_rank[:last]] == [line["after"] for line in done[0][:last]]
        if last:
            position, step = Position.from_json(done[0][last - 1]["after"]), done[0][last - 1]["step"]
        for path in tmp_path.glob("rank-*"):
            path.unlink()
    assert len(worlds) > len(WORLDS), "it was not killed often enough"
    assert learnt == Counter(dict.fromkeys(range(DOCUMENTS), EPOCHS))
    learnt[3] += 1  # the comparison can fail
    assert learnt != Counter(dict.fromkeys(range(DOCUMENTS), EPOCHS))
