"""A micro-batch is its rows end to end: nothing is padded, and nothing is predicted across documents."""

import numpy as np

from bigtune.data.collate import collate
from bigtune.data.document import Document
from bigtune.data.rows import Row
from tests.stores import document


def row(*documents: Document) -> Row:
    return Row(tuple(range(len(documents))), documents)


def test_a_micro_batch_is_flat_and_its_predictions_stay_within_documents() -> None:
    """Document i is made of the token i + 1; its second half is supervised."""
    lengths = np.random.default_rng(0).integers(2, 40, 12).tolist()
    documents = [document([i + 1] * n, (n - n // 2, n)) for i, n in enumerate(lengths)]
    rows = [row(*documents[:5]), row(documents[5]), row(*documents[6:])]
    batch = collate(rows)
    assert batch.tokens == len(batch.input_ids) == sum(lengths) == sum(one.tokens for one in rows)
    assert batch.input_ids.tolist() == [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
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
    whole = document([7, 8, 9], (0, 3))
    batch = collate([row(whole, whole)])
    assert batch.predict_at.tolist() == [0, 1, 3, 4] and batch.targets.tolist() == [8, 9, 8, 9]
    alone = document([7, 8, 9], (0, 1), (2, 3), weights=[5.0, 0.5])
    batch = collate([row(alone)])
    assert batch.targets.tolist() == [9] and batch.weights.tolist() == [0.5]


def test_each_supervised_token_has_the_weight_of_its_span() -> None:
    first = document(range(10, 18), (1, 3), (5, 8), weights=[0.5, 2.0])
    batch = collate([row(first, document(range(20, 24))), row(document(range(30, 33), (2, 3)))])
    assert batch.targets.tolist() == [11, 12, 15, 16, 17, 32]
    assert batch.weights.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0, 1.0] and batch.weights.dtype == np.float32
    assert batch.weight == 8.0 and batch.supervised == 6


def test_weights_are_summed_in_float64() -> None:
    many = document([1] * 100_001, (1, 100_001), weights=[0.1])
    assert abs(collate([row(many)]).weight - 100_000 * float(np.float32(0.1))) < 1e-6


def test_no_rows_are_one_token_without_weight() -> None:
    batch = collate([])
    assert (batch.tokens, batch.supervised, batch.weight) == (0, 0, 0.0)
    assert batch.input_ids.tolist() == batch.position_ids.tolist() == [0]
    assert batch.document_offsets.tolist() == [0, 1] and batch.predict_at.tolist() == []
    assert batch.weights.dtype == np.float32


def test_documents_without_anything_supervised_still_stand_in_the_batch() -> None:
    batch = collate([row(document([5, 6]), document([7]))])
    assert (batch.tokens, batch.supervised, batch.input_ids.tolist()) == (3, 0, [5, 6, 7])


def test_documents_apart_are_each_of_them_collated_alone() -> None:
    documents = [document(range(10, 18), (1, 3), (5, 8), weights=[0.5, 2.0]), document([7]), document([1, 2], (1, 2))]
    apart = collate([row(*documents[:2]), row(documents[2])]).apart()
    alone = [collate([row(one)]) for one in documents]
    assert len(apart) == 3
    for one, other in zip(apart, alone, strict=True):
        for name in ("input_ids", "position_ids", "document_offsets", "predict_at", "targets", "weights"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()
        assert (one.tokens, one.weight) == (other.tokens, other.weight)
    (stand_in,) = collate([]).apart()
    assert (stand_in.tokens, stand_in.supervised) == (0, 0)
