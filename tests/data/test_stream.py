"""What is read depends on the seed and the position alone: ranks, steps and interruptions change nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from bigtune.data.rows import Position
from bigtune.data.store import Store
from bigtune.data.stream import RowStream, steps_of
from bigtune.errors import CheckpointError, DataError
from tests.stores import data_of, document, make_store

DOCUMENTS, LENGTH = 60, 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Document i is made of the token i + 1; its second half is supervised. Lengths go from 2 to 39."""
    lengths = np.random.default_rng(0).integers(2, 40, DOCUMENTS)
    documents = [document([i + 1] * n, (n - n // 2, n)) for i, n in enumerate(lengths)]
    return make_store(tmp_path_factory.mktemp("store") / "s", documents, parts=3)


def stream(store: Store, epochs: int | None = None, seed: int = 5) -> RowStream:
    return RowStream(store, data_of(sequence_length=LENGTH), seed, epochs)


def read(store: Store, start: Position, count: int, epochs: int | None = None) -> list[tuple[int, ...]]:
    return [row.indices for row in stream(store, epochs).take(start, count)[0]]


def test_every_document_once_an_epoch(store: Store) -> None:
    rows = stream(store, epochs=2)
    seen: list[int] = []
    position, steps = Position(), 0
    while taken := rows.take(position, 4):
        if not taken[0]:
            break
        position, steps = taken[1], steps + 1
        seen += [index for row in taken[0] for index in row.indices]
    assert np.bincount(seen).tolist() == [2] * DOCUMENTS
    assert position == Position(2, 0) and steps == steps_of(rows, epochs=2, global_batch=4)


def test_rows_hold_the_documents_that_they_name(store: Store) -> None:
    rows, _ = stream(store).take(Position(), 5)
    for row in rows:
        assert row.tokens == sum(len(d.input_ids) for d in row.documents) <= LENGTH
        assert [int(d.input_ids[0]) for d in row.documents] == [i + 1 for i in row.indices]
        assert row.work == sum(len(d.input_ids) ** 2 for d in row.documents)
        assert row.supervised == sum(len(d.input_ids) // 2 for d in row.documents)


def test_a_stream_goes_on_from_any_position_as_if_never_stopped(store: Store) -> None:
    whole = read(store, Position(), 40)
    parts: list[tuple[int, ...]] = []
    position = Position()
    for count in (1, 7, 3, 12, 17):
        rows, position = stream(store).take(position, count)  # a new process
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
        parts += [row.indices for row in rows]
    assert parts == whole
    rows_an_epoch = stream(store).rows_after(Position(), 1)
    assert sorted(whole[:rows_an_epoch]) != sorted(whole[rows_an_epoch : 2 * rows_an_epoch])  # packed anew


def test_another_seed_gives_another_order(store: Store) -> None:
    rows, _ = stream(store, seed=6).take(Position(), 10)
    assert [row.indices for row in rows] != read(store, Position(), 10)


def test_a_bounded_stream_ends_with_fewer_then_no_rows(store: Store) -> None:
    rows_of = stream(store, epochs=1)
    total = rows_of.rows_after(Position(), 1)
    rows, position = rows_of.take(Position(0, 2), total)
    assert len(rows) == total - 2 and position == Position(1, 0)
    assert rows_of.take(position, 3) == ([], position)
    assert rows_of.epochs_at(position) == 1 and rows_of.epochs_at(Position(0, total // 2)) == (total // 2) / total


def test_epochs_of_a_mixture_may_have_other_numbers_of_rows(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(8, 60, 300)
    documents = [document([1] * n, (1, n)) for n in lengths]
    store = make_store(tmp_path / "s", documents[:100], documents[100:])
    rows = RowStream(store, data_of(2, LENGTH, weights=[3, 1]), 0, 4)
    position, counts = Position(), [0] * 4
    while True:
        taken, after = rows.take(position, 1)
        if not taken:
            break
        counts[position.epoch] += 1
        position = after
    assert len(set(counts)) > 1 and sum(counts) == rows.rows_after(Position(), 4)


def test_what_is_packed_is_in_the_fingerprint(store: Store) -> None:
    base = stream(store).fingerprint
    assert base == RowStream(store, data_of(sequence_length=LENGTH), 9, 3).fingerprint
    for data in (
        data_of(sequence_length=65),
        data_of(sequence_length=LENGTH, caps=[20]),
        data_of(sequence_length=LENGTH, on_long_document="split"),
    ):
        assert RowStream(store, data, 5, None).fingerprint != base


def test_a_position_of_another_store_is_refused(store: Store) -> None:
    with pytest.raises(DataError, match="no row 999 in an epoch"):
        stream(store).take(Position(0, 999), 1)
    for tree in (
        {},
        {"epoch": 0, "row": -1, "shard": 0, "window": 0},
        {"epoch": 0, "row": "1", "shard": 0, "window": 0},
        {"epoch": True, "row": 0, "shard": 0, "window": 0},
        {"epoch": 0, "row": 0},
    ):
        with pytest.raises(CheckpointError, match="data position"):
            Position.from_json(tree)


def test_documents_that_are_all_too_long_are_refused(store: Store) -> None:
    with pytest.raises(DataError, match=r"every document is longer than data.sequence_length \(8\)"):
        only_long = make_store(store.path.parent / "long", [document([1] * 9, (1, 9))])
        RowStream(only_long, data_of(sequence_length=8), 0, None)
