"""What is read depends on the seed and the position alone: ranks, steps and interruptions change nothing."""

import json

import numpy as np
import pytest

from bigtune.data.chat import Encoded
from bigtune.data.conversation import Conversation
from bigtune.data.store import Manifest, Store, StoreWriter
from bigtune.data.stream import Position, Row, RowStream, collate, deal, steps_of
from bigtune.errors import CheckpointError, DataError

DOCUMENTS, LENGTH = 60, 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Document i is made of the token i + 1; its second half is supervised."""
    path = tmp_path_factory.mktemp("store")
    lengths = np.random.default_rng(0).integers(2, 40, DOCUMENTS)
    documents = [
        Encoded(np.full(n, i + 1, np.int32), np.array([[n - n // 2, n]], np.int32)) for i, n in enumerate(lengths)
    ]
    with StoreWriter(path) as writer:
        writer.add(documents, [Conversation((), path, i, text="x") for i in range(DOCUMENTS)])
        writer.finish(Manifest("f", "i", LENGTH, DOCUMENTS, DOCUMENTS, DOCUMENTS, int(lengths.sum()), 1, 39, 0))
    return Store.open(path)


def read(store: Store, start: Position, count: int, epochs: int | None = None) -> list[tuple[int, ...]]:
    rows, _ = RowStream(store, LENGTH, seed=5, epochs=epochs).take(start, count)
    return [row.indices for row in rows]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_document_once_an_epoch_for_any_number_of_ranks(store: Store, world: int) -> None:
    stream = RowStream(store, LENGTH, seed=5, epochs=2)
    seen: list[int] = []
    position, steps = Position(), 0
    while rows := (taken := stream.take(position, 4))[0]:
        position, steps = taken[1], steps + 1
        for rank in range(world):
            for micro in deal(rows, rank, world, micro_batch=1, global_batch=4):
                seen += [index for row in micro for index in row.indices]
    assert np.bincount(seen).tolist() == [2] * DOCUMENTS
    assert position == Position(2, 0)
    assert steps == steps_of(stream, epochs=2, global_batch=4)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_a_global_batch_is_the_same_rows_for_any_number_of_ranks(store: Store, micro_batch: int, count: int) -> None:
    rows, _ = RowStream(store, LENGTH, seed=5, epochs=None).take(Position(), count)
    for world in (1, 2, 3, 4):
        dealt = [deal(rows, rank, world, micro_batch, global_batch=8) for rank in range(world)]
        assert len({len(steps) for steps in dealt}) == 1  # every rank runs as many micro-steps
        assert len(dealt[0]) == -(-8 // (world * micro_batch))
        flat = [row for step in zip(*dealt, strict=True) for micro in step for row in micro]
        assert [row.indices for row in flat] == [row.indices for row in rows]
        assert all(len(micro) <= micro_batch for steps in dealt for micro in steps)


def test_reading_goes_on_where_it_stopped_across_epochs(store: Store) -> None:
    whole = read(store, Position(), 100)
    position, parts = Position(), []
    for count in (1, 7, 30, 0, 62):
        stream = RowStream(store, LENGTH, seed=5, epochs=None)  # as after a restart
        rows, position = stream.take(Position.from_json(json.loads(json.dumps(position.to_json()))), count)
        parts += [row.indices for row in rows]
    assert parts == whole
    rows_an_epoch = RowStream(store, LENGTH, seed=5, epochs=None).total_rows(1)
    assert sorted(whole[:rows_an_epoch]) != sorted(whole[rows_an_epoch : 2 * rows_an_epoch])  # packed anew


def test_a_bounded_stream_ends_with_fewer_then_no_rows(store: Store) -> None:
    stream = RowStream(store, LENGTH, seed=5, epochs=1)
    total = stream.total_rows(1)
    rows, position = stream.take(Position(0, 2), total)
    assert len(rows) == total - 2 and position == Position(1, 0)
    assert stream.take(position, 3) == ([], position)


def test_a_position_of_another_store_is_refused(store: Store) -> None:
    with pytest.raises(DataError, match="no row 999 in an epoch"):
        RowStream(store, LENGTH, seed=5, epochs=None).take(Position(0, 999), 1)
    for tree in ({}, {"epoch": 0, "row": -1}, {"epoch": 0, "row": "1"}, {"epoch": True, "row": 0}):
        with pytest.raises(CheckpointError, match="data position"):
            Position.from_json(tree)


def test_a_micro_batch_is_flat_and_its_predictions_stay_within_documents(store: Store) -> None:
    rows, _ = RowStream(store, LENGTH, seed=5, epochs=None).take(Position(), 3)
    batch = collate(rows)
    documents = [document for row in rows for document in row.documents]
    lengths = [len(document.input_ids) for document in documents]
    assert batch.tokens == len(batch.input_ids) == sum(lengths) == sum(row.tokens for row in rows)
    assert batch.document_offsets.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert batch.supervised == sum(n // 2 for n in lengths)
    # A document is one token over and over: a target and where it is predicted agree only within it.
    assert np.array_equal(batch.input_ids[batch.predict_at], batch.targets)
    assert np.array_equal(batch.input_ids[batch.predict_at + 1], batch.targets)
    assert np.diff(batch.predict_at).min() > 0
    for array in (batch.input_ids, batch.position_ids, batch.predict_at, batch.targets):
        assert array.dtype == np.int64
    assert batch.document_offsets.dtype == np.int32


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    document = Encoded(np.array([7, 8, 9], np.int32), np.array([[0, 3]], np.int32))
    row = Row((0, 1), (document, document))  # type: ignore[arg-type]
    batch = collate([row])
    assert batch.predict_at.tolist() == [0, 1, 3, 4] and batch.targets.tolist() == [8, 9, 8, 9]


def test_no_rows_are_one_token_without_weight() -> None:
    batch = collate([])
    assert (batch.tokens, batch.supervised) == (0, 0)
    assert batch.input_ids.tolist() == batch.position_ids.tolist() == [0]
    assert batch.document_offsets.tolist() == [0, 1] and batch.predict_at.tolist() == []
