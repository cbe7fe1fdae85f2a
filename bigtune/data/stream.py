"""The endless or bounded stream of packed rows from a prepared store, and its global position.

store ──cut, draw──▶ pieces ──plan of an epoch──▶ rows ──take──▶ one global batch
"""

import hashlib
import json

import numpy as np
import numpy.typing as npt

from bigtune.config import Data
from bigtune.data.document import Document
from bigtune.data.pieces import Mixture, cut
from bigtune.data.plan import Plan, plan_rows
from bigtune.data.rows import Position, Row
from bigtune.data.store import Store
from bigtune.errors import DataError

START = Position()


class RowStream:
    """Rows of epoch after epoch, `epochs` of them or endlessly (None); every epoch is drawn and packed anew."""

    def __init__(self, store: Store, data: Data, seed: int, epochs: int | None) -> None:
        """Raises DataError if no document fits the rows."""
        self.store, self.seed, self.epochs = store, seed, epochs
        self.sequence_length = data.sequence_length
        if not len(store):
            raise DataError(f"{store.path}: the store is empty; run `bigtune prepare RUN.yaml`")
        self.pieces = cut(store, data)
        if not len(self.pieces):
            raise DataError(
                f"{store.path}: every document is longer than data.sequence_length ({data.sequence_length:,}); "
                "raise it, or set data.on_long_document: truncate or split"
            )
        self.mixture = Mixture(store, self.pieces, data, seed)
        shares = [(source.weight, source.max_documents) for source in data.sources]
        facts = [store.fingerprint, data.sequence_length, data.on_long_document, data.mixture, shares]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._epoch = -1
        self._plan_of(0)
        self._row_counts = {0: self._plan.rows}

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        """The next `count` rows from `position` on, and the position after them; fewer where the stream ends.

        Raises:
            DataError: the position is not in this stream.
        """
        rows: list[Row] = []
        epoch, row = position.epoch, position.row
        while len(rows) < count and (self.epochs is None or epoch < self.epochs):
            plan = self._plan_of(epoch)
            if row >= plan.rows:
                raise DataError(
                    f"{self.store.path}: no row {row} in an epoch of {plan.rows} rows; "
                    "the position is of another store or sequence length"
                )
            end = min(row + count - len(rows), plan.rows)
            rows.extend(self._read(self._drawn[plan.row(i)]) for i in range(row, end))
            epoch, row = (epoch, end) if end < plan.rows else (epoch + 1, 0)
        return rows, Position(epoch, row)

    def where(self, row: Row) -> tuple[str, ...]:
        return tuple(self.store.where(int(self.pieces.document[i])) for i in row.indices)

    def rows_after(self, position: Position, epochs: int) -> int:
        """How many rows there are from a position to the end of the last of `epochs`; 0 where that is past."""
        return max(0, sum(self._rows_in(epoch) for epoch in range(position.epoch, epochs)) - position.row)

    def epochs_at(self, position: Position) -> float:
        """How many epochs were read before a position; 1.5 in the middle of the second."""
        return position.epoch + (position.row / self._rows_in(position.epoch) if position.row else 0)

    @property
    def efficiency(self) -> float:
        """The share of the first epoch's rows that tokens fill, 0 to 1."""
        drawn = self.mixture.draw(0)
        return float(self.pieces.length[drawn].sum(dtype=np.int64)) / (self._rows_in(0) * self.sequence_length)

    @property
    def documents(self) -> str:
        return self.store.fingerprint

    @property
    def chat_template(self) -> str | None:
        manifest = self.store.manifest
        return manifest.template_text if manifest.template != "model" and manifest.conversations else None

    @property
    def highest_token(self) -> int:
        return self.store.manifest.highest_token

    def longest(self) -> tuple[int, str]:
        at = int(self.pieces.length.argmax())
        return int(self.pieces.length[at]), self.store.where(int(self.pieces.document[at]))

    def describe(self) -> str:
        return f"rows of {self.sequence_length:,} tokens ({self.efficiency:.1%} full)"

    def summary(self) -> str:
        """A line on an epoch's rows, and one more for each thing that cutting and mixing did."""
        lines = [f"{self._rows_in(0):,} rows of {self.sequence_length:,} tokens an epoch, {self.efficiency:.1%} full"]
        lines += [f"  {note}" for note in self.pieces.notes(self.sequence_length)]
        shares = self.mixture.proportions(self.mixture.draw(0))
        if len(shares) > 1:
            lines += [
                f"  {share:.1%} of the tokens from {name} ({count:,} documents)" for name, count, _, share in shares
            ]
        return "\n".join(lines)

    def losses(self) -> str:
        return ""  # `prepare` has told

    def close(self) -> None:
        return None

    def plan(self, epoch: int) -> tuple[Plan, npt.NDArray[np.int64]]:
        """The plan of an epoch, and the pieces that its documents stand for."""
        return self._plan_of(epoch), self._drawn

    def _rows_in(self, epoch: int) -> int:
        # Without a mixture all epochs pack the same lengths, into as many rows: see plan_rows.
        at = epoch if self.mixture.varies else 0
        if at not in self._row_counts:
            drawn = self.mixture.draw(at)
            self._row_counts[at] = plan_rows(self.pieces.length[drawn], self.sequence_length, self.seed, at).rows
        return self._row_counts[at]

    def _plan_of(self, epoch: int) -> Plan:
        if epoch != self._epoch:
            self._epoch, self._drawn = epoch, self.mixture.draw(epoch)
            self._plan = plan_rows(self.pieces.length[self._drawn], self.sequence_length, self.seed, epoch)
        return self._plan

    def _read(self, pieces: npt.NDArray[np.int64]) -> Row:
        return Row(tuple(map(int, pieces)), tuple(self._piece(int(piece)) for piece in pieces))

    def _piece(self, i: int) -> Document:
        document = self.store.document(int(self.pieces.document[i]))
        start, length = int(self.pieces.start[i]), int(self.pieces.length[i])
        return document if length == len(document) else document.piece(start, length)


def steps_of(stream: RowStream, epochs: int, global_batch: int, start: Position = START) -> int:
    """Optimizer steps from `start` to the end of the last of `epochs`; the last step may have fewer rows."""
    return -(-stream.rows_after(start, epochs) // global_batch)
