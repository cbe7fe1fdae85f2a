"""Batches are ready before the step asks; what goes wrong in the thread is raised in the loop."""

import threading
import time

import numpy as np
import pytest

from bigtune.data.loader import Loader
from bigtune.data.rows import Position, Row
from bigtune.data.store import Store
from bigtune.data.stream import RowStream
from bigtune.dist import World
from bigtune.errors import DataError
from tests.stores import data_of, document, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    lengths = np.random.default_rng(0).integers(2, 40, 60)
    documents = [document([i + 1] * n, (n - n // 2, n)) for i, n in enumerate(lengths)]
    return make_store(tmp_path_factory.mktemp("store") / "s", documents)


def rows_of(store: Store, epochs: int | None = 1) -> RowStream:
    return RowStream(store, data_of(sequence_length=64), 5, epochs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_ranks_together_learn_every_document_once(store: Store, world_size: int, micro_batch: int) -> None:
    tokens: list[int] = []
    for rank in range(world_size):
        with Loader(rows_of(store), Position(), World(rank, world_size), micro_batch, 6) as loader:
            position = Position()
            while position.epoch == 0:
                step = loader.next()
                position = step.after
                assert len(step.batches) == -(-6 // (world_size * micro_batch))
                tokens += [token for batch in step.batches if batch.tokens for token in batch.input_ids.tolist()]
    lengths = store.lengths
    assert np.bincount(tokens, minlength=61)[1:].tolist() == lengths.tolist()


def test_a_loader_begins_at_its_position_and_ends_with_empty_steps(store: Store) -> None:
    total = rows_of(store).rows_after(Position(), 1)
    with Loader(rows_of(store), Position(0, total - 3), World(), 1, 2) as loader:
        assert [sum(batch.tokens > 0 for batch in loader.next().batches) for _ in range(3)] == [2, 1, 0]


class _Broken:
    """Rows of which the second batch cannot be read."""

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        if position.row:
            raise DataError("a.jsonl: gone")
        return [], Position(0, 1)


def test_an_error_in_the_thread_reaches_the_loop(store: Store) -> None:
    with Loader(_Broken(), Position(), World(), 1, 2) as loader:  # type: ignore[arg-type]
        loader.next()
        with pytest.raises(DataError, match=r"a.jsonl: gone"):
            loader.next()


def test_leaving_early_ends_the_thread(store: Store) -> None:
    before = threading.active_count()
    with Loader(rows_of(store, epochs=None), Position(), World(), 1, 2) as loader:
        loader.next()
    assert threading.active_count() == before


class _Stuck:
    """Rows of which the second batch comes when it is let go, as on a disk that hangs."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        if position.row:
            self.let_go.wait()
        return [], Position(0, 1)


@pytest.mark.timeout(60)
def test_an_error_gets_out_though_the_thread_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtune.data.loader.LEAVE_SECONDS", 0.2)
    rows = _Stuck()
    with pytest.raises(KeyboardInterrupt), Loader(rows, Position(), World(), 1, 2) as loader:  # type: ignore[arg-type]
        loader.next()
        raise KeyboardInterrupt
    assert loader._thread.is_alive() and loader._thread.daemon  # it does not keep the process
    rows.let_go.set()
    loader._thread.join(10)
    assert not loader._thread.is_alive()


class _Gated:
    """Rows that come when they are let through."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.taken = 0

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        self.gate.acquire()
        self.taken += 1
        return [], Position(0, position.row + 1)


def test_waiting_for_rows_is_counted_and_rows_that_are_ready_are_not_waited_for() -> None:
    rows = _Gated()
    with Loader(rows, Position(), World(), 1, 2) as loader:  # type: ignore[arg-type]
        threading.Timer(0.5, rows.gate.release).start()
        loader.next()
        blocked = loader.waited_seconds
        rows.gate.release(2)
        while rows.taken < 3 or loader._queue.qsize() < 2:
            time.sleep(0.01)
        loader.next()
        loader.next()
        assert blocked > 0.4 and loader.waited_seconds - blocked < blocked / 2
        rows.gate.release(9)  # lets the thread see that it is to end
