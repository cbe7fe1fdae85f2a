"""Rows are full, never too full, and the same for the same seed and epoch."""

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtune.data.plan import Plan, plan_rows, row_patterns
from bigtune.errors import DataError

LENGTHS = np.random.default_rng(1).lognormal(5, 0.6, 5000).clip(8, 1024).astype(np.int32)


def same(a: Plan, b: Plan) -> bool:
    return np.array_equal(a.documents, b.documents) and np.array_equal(a.offsets, b.offsets)


def fill_of(plan: Plan, lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Tokens of each row."""
    return np.array([lengths[plan.row(i)].sum() for i in range(plan.rows)], dtype=np.int64)


def best_fit_efficiency(lengths: npt.NDArray[np.integer], room: int) -> float:
    """What best-fit decreasing reaches: each document into the fullest row that has room for it."""
    rooms = np.full(len(lengths), room)
    for length in np.sort(lengths)[::-1].tolist():
        left = np.where(rooms >= length, rooms - length, 2 * room)
        rooms[left.argmin()] -= length  # unused rows are the emptiest
    return float(lengths.sum() / (room * np.count_nonzero(rooms < room)))


def test_each_document_once_and_no_row_too_long() -> None:
    plan = plan_rows(LENGTHS, 1024, seed=3, epoch=0)
    assert sorted(plan.documents.tolist()) == list(range(len(LENGTHS)))
    fill = fill_of(plan, LENGTHS)
    assert fill.max() <= 1024 and fill.min() > 0
    assert plan.efficiency(LENGTHS, 1024) == pytest.approx(fill.mean() / 1024)


@given(st.lists(st.integers(1, 64), max_size=120), st.integers(0, 3), st.integers(0, 3))
def test_any_lengths_are_packed_whole_and_tightly(numbers: list[int], seed: int, epoch: int) -> None:
    lengths = np.array(numbers, dtype=np.int32)
    plan = plan_rows(lengths, 64, seed, epoch)
    assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
    fill = fill_of(plan, lengths)
    assert ((fill > 0) & (fill <= 64)).all()
    assert -(-sum(numbers) // 64) <= plan.rows == plan_rows(lengths, 64, seed + 1, epoch).rows
    shortest = [int(lengths[plan.row(i)].min()) for i in range(plan.rows)]
    for i, j in itertools.combinations(range(plan.rows), 2):  # nothing of one would have fitted into the other
        assert fill[i] + shortest[j] > 64 or fill[j] + shortest[i] > 64


def test_rows_are_fuller_than_best_fit_makes_them() -> None:
    """Lengths such as GSM8K's, of which none is short enough for the room that best fit leaves."""
    lengths = np.random.default_rng(0).lognormal(5, 0.35, 7000).clip(60, 450).astype(np.int32)
    plan = plan_rows(lengths, 2048, seed=0, epoch=0)
    assert plan.rows == -(-int(lengths.sum()) // 2048)  # fewer are impossible
    assert plan.efficiency(lengths, 2048) > 0.998
    assert best_fit_efficiency(lengths, 2048) < 0.995


@pytest.mark.parametrize(("mean", "spread"), [(4, 0.5), (5.5, 1.0), (6, 1.2)])
@pytest.mark.parametrize("sequence_length", [1024, 4096])
def test_rows_are_full_whatever_the_lengths(mean: float, spread: float, sequence_length: int) -> None:
    lengths = np.random.default_rng(2).lognormal(mean, spread, 10_000).clip(1, sequence_length).astype(np.int32)
    rows = plan_rows(lengths, sequence_length, seed=0, epoch=0).rows
    assert rows <= 1.001 * lengths.sum() / sequence_length + 1


def test_where_no_row_can_be_filled_packing_is_as_good_as_best_fit() -> None:
    lengths = np.random.default_rng(3).integers(300, 401, 2000)
    plan = plan_rows(lengths, 1000, seed=0, epoch=0)
    assert plan.efficiency(lengths, 1000) > best_fit_efficiency(lengths, 1000) - 0.005


def test_seed_and_epoch_decide_the_rows_but_not_their_number() -> None:
    first = plan_rows(LENGTHS, 1024, seed=3, epoch=0)
    assert same(first, plan_rows(LENGTHS, 1024, seed=3, epoch=0))
    for seed, epoch in ((3, 1), (4, 0)):
        other = plan_rows(LENGTHS, 1024, seed, epoch)
        assert not same(first, other) and other.rows == first.rows


def test_plans_are_those_of_other_machines_and_of_earlier_versions() -> None:
    """A run that goes on elsewhere reads on in the same rows. If NumPy ever changes this, raise the store's version."""
    plan = plan_rows(np.arange(3000) * 7919 % 500 + 8, 1024, seed=3, epoch=1)
    digest = hashlib.sha256(plan.documents.astype("<i8").tobytes() + plan.offsets.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "2a7b2ce632c455b8"


def test_neither_rows_nor_documents_stand_by_length() -> None:
    plan = plan_rows(LENGTHS, 1024, seed=3, epoch=0)
    first, last = LENGTHS[plan.documents[plan.offsets[:-1]]], LENGTHS[plan.documents[plan.offsets[1:] - 1]]
    assert first.mean() == pytest.approx(last.mean(), rel=0.1)
    counts = np.diff(plan.offsets)
    half = plan.rows // 2
    assert counts[:half].mean() == pytest.approx(counts[half:].mean(), rel=0.15)


def test_documents_of_one_length_change_places_from_epoch_to_epoch() -> None:
    lengths = np.full(4000, 5)
    rows = [plan_rows(lengths, 20, seed=0, epoch=epoch).documents.reshape(-1, 4) for epoch in (0, 1)]
    together = [{frozenset(map(int, row)) for row in epoch} for epoch in rows]
    assert len(together[0] & together[1]) < 5


@pytest.mark.parametrize(("lengths", "rows"), [([], 0), ([8], 1), ([8, 8], 2), ([4, 4, 8, 1], 3), ([5, 3, 5, 3], 2)])
def test_small_cases(lengths: list[int], rows: int) -> None:
    plan = plan_rows(np.array(lengths, dtype=np.int32), 8, seed=0, epoch=0)
    assert plan.rows == rows and len(plan.documents) == len(lengths)


def test_a_document_longer_than_a_row_or_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="document 1 of the store has 9 tokens"):
        plan_rows(np.array([8, 9]), 8, seed=0, epoch=0)
    with pytest.raises(DataError, match="document 1 of the store has no tokens"):
        plan_rows(np.array([8, 0]), 8, seed=0, epoch=0)


def test_the_steps_of_packing_do_not_grow_with_the_number_of_documents() -> None:
    counts = np.bincount(LENGTHS, minlength=1025)
    few, many = row_patterns(counts, 1024), row_patterns(counts * 10_000, 1024)
    assert sum(pattern.rows for pattern in many) <= 10_000 * sum(pattern.rows for pattern in few)
    assert len(many) < 2 * len(few) < len(LENGTHS)


def test_rows_may_be_longer_than_16_bits_count() -> None:
    lengths = np.array([70_000, 61_072, 131_072, 1, 60_000, 71_000])
    plan = plan_rows(lengths, 131_072, seed=0, epoch=0)
    assert plan.rows == 3 and fill_of(plan, lengths).max() == 131_072
