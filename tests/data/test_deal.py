"""A global batch's rows are dealt whole and evenly, whatever the number of ranks."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtune.data.deal import EMPTY, EVEN, Imbalance, deal, imbalance, worst_imbalance
from bigtune.data.plan import Plan, plan_rows

Slots = npt.NDArray[np.int64]
LENGTHS = np.random.default_rng(0).lognormal(5.5, 1, 60_000).clip(8, 4096).astype(np.int64)
SUPERVISED = (LENGTHS * np.random.default_rng(1).uniform(0.1, 0.9, len(LENGTHS))).astype(np.int64)
PLAN = plan_rows(LENGTHS, 4096, seed=0, epoch=0)


def loads(batch: int, rows: int) -> tuple[Any, Any]:
    """Attention work and supervised tokens of the rows of one global batch."""
    documents = [PLAN.row(i) for i in range(batch * rows, (batch + 1) * rows)]
    work = np.array([(LENGTHS[row] ** 2).sum() for row in documents])
    return work, np.array([SUPERVISED[row].sum() for row in documents])


def in_order(rows: int, data_world: int) -> Slots:
    """Rows dealt to the ranks in turn, as they come."""
    return np.arange(rows, dtype=np.int64).reshape(-1, data_world).T[:, :, None]


def steps(slots: Slots, work: Any) -> float:
    """What ranks that meet after every micro-step need, relative to perfectly even ones."""
    slowest = np.append(work, 0)[slots].sum(axis=2).max(axis=0).sum()
    return float(slowest / (work.sum() / len(slots)))


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 4096)), max_size=40),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 30),
)
def test_each_row_stands_in_one_slot(rows: list[tuple[int, int]], world: int, micro_batch: int, more: int) -> None:
    work, supervised = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    global_batch = max(len(rows) + more, 1)
    slots = deal(work, supervised, world, micro_batch, global_batch)
    assert slots.shape == (world, -(-global_batch // (world * micro_batch)), micro_batch)
    assert sorted(slots[slots != EMPTY].tolist()) == list(range(len(rows)))
    counts = (slots != EMPTY).sum(axis=(1, 2))
    assert counts.max() - counts.min() <= 1
    flat = slots.reshape(world, -1)
    assert all((row[:count] != EMPTY).all() for row, count in zip(flat, counts, strict=True))  # empty ones are last
    assert np.array_equal(slots, deal(work, supervised, world, micro_batch, global_batch))
    found = imbalance(slots, work, supervised)
    assert 1 <= found.work <= world + 1e-9 and 1 <= found.supervised <= world + 1e-9


@pytest.mark.parametrize(("rows", "world"), [(64, 8), (64, 2), (256, 32), (1024, 64)])
def test_long_tailed_documents_are_spread_evenly(rows: int, world: int) -> None:
    """In their own order, the ranks' work differs by a third of the mean and more; dealt, by a fiftieth at most."""
    before, after = [], []
    for batch in range(4):
        work, supervised = loads(batch, rows)
        plain = imbalance(in_order(rows, world), work, supervised)
        dealt = imbalance(deal(work, supervised, world, 1, rows), work, supervised)
        before.append([plain.work - 1, plain.supervised - 1])
        after.append([dealt.work - 1, dealt.supervised - 1])
    assert (np.max(after, axis=0) < 4 * EVEN).all()
    assert (np.mean(after, axis=0) < np.mean(before, axis=0) / 5).all()
    if world > 2:
        assert np.mean(before, axis=0)[0] > 0.3


def test_one_load_alone_would_leave_the_other_uneven() -> None:
    """The mutation: what is even in attention work is not by that even in supervised tokens, nor the other way."""
    work, supervised = loads(0, 64)
    by_work, by_tokens = (deal(load, load, 8, 1, 64) for load in (work, supervised))
    assert imbalance(by_work, work, supervised).supervised > 1 + 4 * EVEN
    assert imbalance(by_tokens, work, supervised).work > 1 + 4 * EVEN


def test_the_heaviest_rows_of_all_ranks_share_a_micro_step() -> None:
    work, supervised = loads(0, 64)
    slots = deal(work, supervised, 8, 1, 64)
    load = work / work.mean() + supervised / supervised.mean()
    assert (np.diff(load[slots[:, :, 0]], axis=1) <= 0).all()
    assert steps(slots, load) < 1 + (steps(in_order(64, 8), load) - 1) / 2
    shuffled = np.random.default_rng(0).permuted(slots, axis=1)  # as even, but not sorted
    assert steps(slots, load) < 1 + (steps(shuffled, load) - 1) / 2


def test_small_cases_by_hand() -> None:
    none = np.zeros(4, dtype=np.int64)
    # 9 + 1 against 6 + 4.
    slots = deal(np.array([1, 9, 4, 6]), none, 2, 1, 4)
    assert slots.tolist() == [[[1], [0]], [[3], [2]]]
    assert imbalance(slots, np.array([1, 9, 4, 6]), none) == Imbalance(1.0, 1.0)
    # To and fro gives 8 + 3 + 2 and 6 + 4 + 1 of work; swapping 3 and 2 evens it.
    work = np.array([8, 6, 4, 3, 2, 1])
    slots = deal(work, work, 2, 1, 6)
    assert sorted(work[slots].sum(axis=(1, 2)).tolist()) == [12, 12]
    # One row is heavier than all others: it cannot be evened, and the others still are.
    work = np.array([100, 5, 5, 5, 5, 1])
    slots = deal(work, np.ones(6), 3, 1, 6)
    assert sorted(work[slots].sum(axis=(1, 2)).tolist()) == [10, 10, 101]


def test_missing_rows_leave_the_last_slots_empty() -> None:
    ones = np.ones(3)
    assert deal(ones, ones, 2, 2, 8).tolist() == [[[0, EMPTY], [EMPTY] * 2], [[1, 2], [EMPTY] * 2]]
    assert (deal(ones[:0], ones[:0], 3, 1, 4) == EMPTY).all()
    assert imbalance(deal(ones[:0], ones[:0], 3, 1, 4), ones[:0], ones[:0]) == Imbalance(1.0, 1.0)
    with pytest.raises(ValueError, match="3 rows for a global batch of 2"):
        deal(ones, ones, 1, 1, 2)


def test_imbalance_is_the_largest_share_over_the_mean() -> None:
    slots = np.array([[[0, 1]], [[2, EMPTY]]])
    assert imbalance(slots, np.array([1, 2, 1]), np.array([5, 0, 15])) == Imbalance(1.5, 1.5)


def test_the_worst_of_an_epoch_is_that_of_its_worst_global_batch() -> None:
    expected = [imbalance(deal(*loads(batch, 16), 4, 2, 16), *loads(batch, 16)) for batch in range(PLAN.rows // 16)]
    worst = worst_imbalance(PLAN, LENGTHS**2, SUPERVISED, 4, 2, 16)
    assert worst == Imbalance(max(one.work for one in expected), max(one.supervised for one in expected))
    assert PLAN.rows % 16  # the rest is filled by the next epoch


def test_an_epoch_of_less_than_a_global_batch_counts_as_one() -> None:
    plan = Plan(np.array([0, 1, 2]), np.array([0, 1, 2, 3]))
    assert worst_imbalance(plan, np.array([1, 1, 4]), np.array([1, 1, 1]), 2, 1, 8).work == pytest.approx(4 / 3)
    empty = Plan(np.empty(0, dtype=np.int64), np.array([0]))
    assert worst_imbalance(empty, np.empty(0), np.empty(0), 2, 1, 8) == Imbalance(1.0, 1.0)
