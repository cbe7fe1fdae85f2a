"""Which rank computes which rows of a global batch: attention work and supervised tokens are even over ranks.

    rows by falling load ──to and fro over the ranks──▶ even counts ──swaps──▶ even loads ──sort──▶ micro-steps

Ranks meet in every micro-step, where ZeRO-3 gathers parameters: the slowest one sets its time. So each rank
computes its heaviest rows first, and rows of much the same load share a micro-step.
Shapes: R rows, W data ranks, M micro-steps, B micro batch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtune.data.plan import Plan

EVEN = 0.005
"""Ranks whose work and supervised tokens are within so much of the mean are left alone."""
MOST_SWAPS = 256
MOST_CANDIDATES = 32
"""Rows of a rank that are considered for one swap."""

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Imbalance:
    """The largest rank's share over the mean rank's; 1 is even, the number of ranks is the worst."""

    work: float
    supervised: float


def deal(
    work: npt.NDArray[np.number],
    supervised: npt.NDArray[np.number],
    data_world: int,
    micro_batch: int,
    global_batch: int,
) -> npt.NDArray[np.int64]:
    """Deal the rows of one global batch to the ranks, the same on every rank.

    Args:
        work: [R], attention work of each row: the sum of its documents' squared lengths.
        supervised: [R], supervised tokens of each row.

    Returns:
        Slots [W, M, B]: the row that a rank computes there, or EMPTY; each row stands in one slot. M is
        ceil(global_batch / (W × B)) whatever R. The numbers of rows of any two ranks differ by one at most.
    """
    rows = len(work)
    if rows > global_batch:
        raise ValueError(f"{rows} rows for a global batch of {global_batch}")
    micro_steps = -(-global_batch // (data_world * micro_batch))
    slots = np.full((data_world, micro_steps * micro_batch), EMPTY, dtype=np.int64)
    if rows:
        # Both loads as one complex number, so that distances count both; the last one is that of EMPTY.
        loads = np.zeros(rows + 1, dtype=np.complex128)
        loads[:rows] = _relative(work) + 1j * _relative(supervised)
        dealt = _to_and_fro(loads, data_world)
        _swap(dealt, loads)
        weights = loads.real + loads.imag
        weights[EMPTY] = -1.0
        order = np.argsort(-weights[dealt], axis=1, kind="stable")
        slots[:, : dealt.shape[1]] = np.take_along_axis(dealt, order, axis=1)
    return slots.reshape(data_world, micro_steps, micro_batch)


def _relative(values: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    exact = values.astype(np.float64)
    return exact / (exact.mean() or 1.0)


def _to_and_fro(loads: npt.NDArray[np.complex128], ranks: int) -> npt.NDArray[np.int64]:
    """Rows by falling load, one to each rank in turn and back again: [W, ceil(R / W)]."""
    order = np.argsort(-(loads.real + loads.imag)[:-1], kind="stable")
    rounds = np.full((-(-len(order) // ranks), ranks), EMPTY, dtype=np.int64)
    rounds.reshape(-1)[: len(order)] = order
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return np.ascontiguousarray(rounds.T)


def _swap(dealt: npt.NDArray[np.int64], loads: npt.NDArray[np.complex128]) -> None:
    """Swap rows between the rank furthest from the mean and the rank furthest from that one, while it helps.

    Swapping rows whose loads differ by half of what the two ranks differ by makes these equal.
    """
    ranks, rows = dealt.shape
    if rows == 1:
        return  # a swap of all that two ranks have changes nothing
    step = -(-rows // MOST_CANDIDATES)
    sums = loads[dealt].sum(axis=1)
    mean = sums.mean()
    hopeless = np.zeros(ranks, dtype=bool)
    for _ in range(MOST_SWAPS):
        off = np.abs(sums - mean)
        off[hopeless] = 0.0
        a = int(off.argmax())
        if off[a] <= EVEN * rows:
            return
        b = int(np.abs(sums - sums[a]).argmax())
        half = (sums[b] - sums[a]) / 2
        mine, theirs = loads[dealt[a, ::step]], loads[dealt[b, ::step]]
        miss = np.abs(theirs - (mine + half)[:, None])
        none = dealt[[a, b]] == EMPTY
        gap_a, gap_b = none.any(axis=1)
        miss[none[0, ::step] & gap_b] = np.inf  # no rank gets a second empty place
        miss[:, none[1, ::step] & gap_a] = np.inf
        at = int(miss.argmin())
        i, j = divmod(at, miss.shape[1])
        if miss[i, j] >= np.abs(half) * (1 - 1e-9):
            hopeless[a] = True  # such as a rank with one row heavier than all of another's
            continue
        moved = theirs[j] - mine[i]
        sums[a] += moved
        sums[b] -= moved
        dealt[a, i * step], dealt[b, j * step] = dealt[b, j * step], dealt[a, i * step]


def imbalance(
    slots: npt.NDArray[np.int64], work: npt.NDArray[np.number], supervised: npt.NDArray[np.number]
) -> Imbalance:
    """How uneven the ranks of `slots` [W, M, B] are, for `work` and `supervised` [R]."""
    ranks = slots.reshape(len(slots), -1)
    return Imbalance(*(_largest_over_mean(np.append(values, 0)[ranks].sum(axis=1)) for values in (work, supervised)))


def _largest_over_mean(sums: npt.NDArray[np.number]) -> float:
    mean = float(sums.mean())
    return float(sums.max()) / mean if mean else 1.0


def worst_imbalance(
    plan: Plan,
    work: npt.NDArray[np.number],
    supervised: npt.NDArray[np.number],
    data_world: int,
    micro_batch: int,
    global_batch: int,
) -> Imbalance:
    """The worst of all global batches of an epoch, for each load by itself.

    Args:
        work: [N], of each document: its squared length.
        supervised: [N], supervised tokens of each document.

    The rest of an epoch that fills no global batch is left out, where there is another: the next epoch fills it.
    """
    if not plan.rows:
        return Imbalance(1.0, 1.0)
    row_work, row_supervised = (
        np.add.reduceat(values[plan.documents].astype(np.float64), plan.offsets[:-1]) for values in (work, supervised)
    )
    worst = Imbalance(1.0, 1.0)
    for start in range(0, max(plan.rows - global_batch, 0) + 1, global_batch):
        part = slice(start, start + global_batch)
        slots = deal(row_work[part], row_supervised[part], data_world, micro_batch, global_batch)
        found = imbalance(slots, row_work[part], row_supervised[part])
        worst = Imbalance(max(worst.work, found.work), max(worst.supervised, found.supervised))
    return worst
