"""Which documents share a row: best-fit decreasing packing, new in every epoch, known from lengths alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtune.errors import DataError


@dataclass(frozen=True)
class Plan:
    """R rows of N documents in CSR form: row r holds `documents[offsets[r]:offsets[r + 1]]`."""

    documents: npt.NDArray[np.int64]  # [N], each document once
    offsets: npt.NDArray[np.int64]  # [R + 1]

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> npt.NDArray[np.int64]:
        """The documents of row `i`, in their order in the row."""
        return self.documents[self.offsets[i] : self.offsets[i + 1]]

    def efficiency(self, lengths: npt.NDArray[np.integer], sequence_length: int) -> float:
        """The share of the rows' room that documents fill, 0 to 1."""
        return float(lengths.sum(dtype=np.int64)) / max(self.rows * sequence_length, 1)


def plan_rows(lengths: npt.NDArray[np.integer], sequence_length: int, seed: int, epoch: int) -> Plan:
    """Pack documents of `lengths` [N] into rows of at most `sequence_length` tokens.

    The same arguments give the same plan. Documents of one length are interchangeable to the packing, so
    that the number of rows, unlike the rows, is the same in every epoch.

    Raises:
        DataError: a document is longer than a row.
    """
    if len(lengths) and int(lengths.max()) > sequence_length:
        longest = int(lengths.argmax())
        raise DataError(
            f"document {longest} of the store has {int(lengths[longest]):,} tokens, more than "
            f"data.sequence_length {sequence_length:,}; run `bigtune prepare RUN.yaml` again"
        )
    random = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    row_of, rows = _best_fit(lengths[order].tolist(), sequence_length)
    row = random.permutation(rows)[np.array(row_of, dtype=np.int64)]
    by_row = np.lexsort((random.permutation(len(lengths)), row))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
    return Plan(order[by_row].astype(np.int64), offsets)


def _best_fit(lengths: list[int], room: int) -> tuple[list[int], int]:
    """The row of each length, given in decreasing order, and the number of rows.

    Bit r of `open_rooms` says that a row with r tokens of room is open: the lowest bit at or above a length
    is the tightest fit, found by integer arithmetic in constant time.
    """
    row_of: list[int] = []
    rows = 0
    open_rooms = 0
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]
    for length in lengths:
        fitting = open_rooms >> length
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            stack = rows_with[length + left]
            row = stack.pop()
            if not stack:
                open_rooms ^= 1 << (length + left)
        else:
            row, left = rows, room - length
            rows += 1
        if left:
            rows_with[left].append(row)
            open_rooms |= 1 << left
        row_of.append(row)
    return row_of, rows
