"""The endless or bounded stream of packed rows, its global position, and micro-batches without padding.

    plan of an epoch ──take──▶ rows of one global batch ──deal──▶ a rank's micro-steps ──collate──▶ arrays

A position knows nothing of ranks: what is read next is the same for any number of them.
Shapes: S tokens of a micro-batch, N its documents, T its supervised tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.data.plan import Plan, plan_rows
from bigtune.data.store import Document, Store
from bigtune.errors import CheckpointError, DataError


@dataclass(frozen=True, slots=True)
class Position:
    """The next row to be read: `row` of the plan of `epoch`, both from 0."""

    epoch: int = 0
    row: int = 0

    def to_json(self) -> dict[str, int]:
        return {"epoch": self.epoch, "row": self.row}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Position":
        """Raises CheckpointError if the tree is no position."""
        epoch, row = tree.get("epoch"), tree.get("row")
        if type(epoch) is not int or type(row) is not int or epoch < 0 or row < 0:
            raise CheckpointError(f"data position {dict(tree)!r}: epoch and row must be whole numbers from 0")
        return cls(epoch, row)


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: indices into the store, and the documents themselves."""

    indices: tuple[int, ...]
    documents: tuple[Document, ...]

    @property
    def tokens(self) -> int:
        return sum(len(document.input_ids) for document in self.documents)


class RowStream:
    """Rows of epoch after epoch, `epochs` of them or endlessly (None); every epoch is packed anew."""

    def __init__(self, store: Store, sequence_length: int, seed: int, epochs: int | None) -> None:
        self.store, self.sequence_length, self.seed, self.epochs = store, sequence_length, seed, epochs
        self._lengths = store.lengths
        if not len(self._lengths):
            raise DataError(f"{store.path}: the store is empty; run `bigtune prepare RUN.yaml`")
        self._epoch = 0
        self._plan = self._plan_of(0)
        self._rows = self._plan.rows  # the same in every epoch: see plan_rows

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        """The next `count` rows from `position` on, and the position after them; fewer where the stream ends.

        Raises:
            DataError: the position is not in this stream.
        """
        if position.row >= self._rows:
            raise DataError(
                f"{self.store.path}: no row {position.row} in an epoch of {self._rows} rows; "
                "the position is of another store or sequence length"
            )
        rows: list[Row] = []
        epoch, row = position.epoch, position.row
        while len(rows) < count and (self.epochs is None or epoch < self.epochs):
            plan = self._cached(epoch)
            end = min(row + count - len(rows), plan.rows)
            rows.extend(self._read(plan.row(i)) for i in range(row, end))
            epoch, row = (epoch, end) if end < plan.rows else (epoch + 1, 0)
        return rows, Position(epoch, row)

    def total_rows(self, epochs: int) -> int:
        return epochs * self._rows

    def epochs_at(self, position: Position) -> float:
        """How many epochs were read before a position; 1.5 in the middle of the second."""
        return position.epoch + position.row / self._rows

    @property
    def efficiency(self) -> float:
        """The share of the rows' room that tokens fill, 0 to 1."""
        return self._plan.efficiency(self._lengths, self.sequence_length)

    def _cached(self, epoch: int) -> Plan:
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self._plan

    def _plan_of(self, epoch: int) -> Plan:
        return plan_rows(self._lengths, self.sequence_length, self.seed, epoch)

    def _read(self, indices: npt.NDArray[np.int64]) -> Row:
        documents = tuple(map(int, indices))
        return Row(documents, tuple(self.store.document(i) for i in documents))


def steps_of(stream: RowStream, epochs: int, global_batch: int) -> int:
    """Optimizer steps that read `epochs` whole epochs; the last one may have fewer rows."""
    return -(-stream.total_rows(epochs) // global_batch)


def deal(rows: Sequence[Row], data_rank: int, data_world: int, micro_batch: int, global_batch: int) -> list[list[Row]]:
    """The rows of one global batch that fall to a rank, by micro-step; the same number of micro-steps on all.

    Slot j = (micro_step × data_world + data_rank) × micro_batch + i takes row j; slots past the last row
    stay empty, so that any number of ranks can run any batch.
    """
    if len(rows) > global_batch:
        raise ValueError(f"{len(rows)} rows for a global batch of {global_batch}")
    micro_steps = -(-global_batch // (data_world * micro_batch))
    starts = [(step * data_world + data_rank) * micro_batch for step in range(micro_steps)]
    return [list(rows[start : start + micro_batch]) for start in starts]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid end to end, without padding."""

    input_ids: npt.NDArray[np.int64]  # [S]
    position_ids: npt.NDArray[np.int64]  # [S], from 0 in each document
    document_offsets: npt.NDArray[np.int32]  # [N + 1], cumulative
    predict_at: npt.NDArray[np.int64]  # [T], where in S the token before a supervised one stands
    targets: npt.NDArray[np.int64]  # [T], the supervised tokens
    tokens: int  # real ones: S, or 0 for the stand-in of no rows

    @property
    def supervised(self) -> int:
        """T."""
        return len(self.targets)


def collate(rows: Sequence[Row]) -> MicroBatch:
    """One flat sequence of the rows' documents.

    No rows give one document of one token with nothing supervised, so that a rank without rows still runs
    the model and its collectives.
    """
    documents = [document for row in rows for document in row.documents]
    ids = [document.input_ids for document in documents] or [np.zeros(1, dtype=np.int32)]
    lengths = np.array([len(part) for part in ids], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.concatenate(ids).astype(np.int64)
    supervised = [
        np.arange(max(start, 1), end) + offset
        for offset, document in zip(offsets.tolist(), documents, strict=False)
        for start, end in document.spans.tolist()
    ]
    at = np.concatenate(supervised).astype(np.int64) if supervised else np.empty(0, dtype=np.int64)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=np.arange(len(input_ids)) - np.repeat(offsets[:-1], lengths),
        document_offsets=offsets.astype(np.int32),
        predict_at=at - 1,
        targets=input_ids[at],
        tokens=len(input_ids) if documents else 0,
    )
