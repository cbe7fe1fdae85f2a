"""Rows are full, never too full, and the same for the same seed and epoch."""

import time

import numpy as np
import pytest

from bigtune.data.plan import Plan, plan_rows
from bigtune.errors import DataError

LENGTHS = np.random.default_rng(1).lognormal(5, 0.6, 5000).clip(8, 1024).astype(np.int32)


def same(a: Plan, b: Plan) -> bool:
    return np.array_equal(a.documents, b.documents) and np.array_equal(a.offsets, b.offsets)


def test_each_document_once_and_no_row_too_long() -> None:
    plan = plan_rows(LENGTHS, 1024, seed=3, epoch=0)
    assert sorted(plan.documents.tolist()) == list(range(len(LENGTHS)))
    fill = np.array([LENGTHS[plan.row(i)].sum() for i in range(plan.rows)])
    assert fill.max() <= 1024 and fill.min() > 0
    assert plan.efficiency(LENGTHS, 1024) == pytest.approx(fill.mean() / 1024)
    assert plan.efficiency(LENGTHS, 1024) > 0.99


def test_seed_and_epoch_decide_the_rows_but_not_their_number() -> None:
    first = plan_rows(LENGTHS, 1024, seed=3, epoch=0)
    assert same(first, plan_rows(LENGTHS, 1024, seed=3, epoch=0))
    for seed, epoch in ((3, 1), (4, 0)):
        other = plan_rows(LENGTHS, 1024, seed, epoch)
        assert not same(first, other) and other.rows == first.rows


def test_neither_rows_nor_documents_stand_by_length() -> None:
    plan = plan_rows(LENGTHS, 1024, seed=3, epoch=0)
    first, last = LENGTHS[plan.documents[plan.offsets[:-1]]], LENGTHS[plan.documents[plan.offsets[1:] - 1]]
    assert first.mean() == pytest.approx(last.mean(), rel=0.1)
    counts = np.diff(plan.offsets)
    half = plan.rows // 2
    assert counts[:half].mean() == pytest.approx(counts[half:].mean(), rel=0.15)


@pytest.mark.parametrize(("lengths", "rows"), [([], 0), ([8], 1), ([8, 8], 2), ([4, 4, 8, 1], 3), ([5, 3, 5, 3], 2)])
def test_small_cases(lengths: list[int], rows: int) -> None:
    plan = plan_rows(np.array(lengths, dtype=np.int32), 8, seed=0, epoch=0)
    assert plan.rows == rows and len(plan.documents) == len(lengths)


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="document 1 of the store has 9 tokens"):
        plan_rows(np.array([8, 9]), 8, seed=0, epoch=0)


def test_planning_is_quick() -> None:
    lengths = np.tile(LENGTHS, 10)
    start = time.perf_counter()
    plan_rows(lengths, 2048, seed=0, epoch=0)
    assert time.perf_counter() - start < 2  # some 0.05 s for 50,000 documents; the bound is for busy machines
