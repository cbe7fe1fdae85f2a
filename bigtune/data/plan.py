"""Which documents share a row: tight packing, new in every epoch, known from lengths alone.

    lengths ──count──▶ documents of each length ──patterns──▶ rows of lengths ──deal out──▶ rows of documents

Packing sees how many documents have which length and no document by itself: a pattern, such as "one of 1,500
tokens and two of 274", is found once and used for as many rows as the counts allow. The Python steps therefore
grow with the number of different lengths, not with that of documents (Krell et al. 2021, arXiv:2107.02027).
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtune.errors import DataError

SEARCH_BITS = 2**20
"""How many bits of reachable room one search for a pattern touches: some 30 microseconds of work."""


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


@dataclass(frozen=True, slots=True)
class Pattern:
    """`rows` rows that are filled alike, each with `documents[n]` documents of n tokens."""

    documents: dict[int, int]
    rows: int


def plan_rows(lengths: npt.NDArray[np.integer], sequence_length: int, seed: int, epoch: int) -> Plan:
    """Pack documents of `lengths` [N] into rows of at most `sequence_length` tokens.

    The same arguments give the same plan. Documents of one length are interchangeable to the packing, so
    that the number of rows, unlike the rows, is the same in every epoch. Takes at most 40 bytes a document,
    the plan's own 8 included.

    Raises:
        DataError: a document is longer than a row, or has no tokens.
    """
    _check(lengths, sequence_length)
    random = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    counts = np.bincount(lengths, minlength=sequence_length + 1) if len(lengths) else np.zeros(1, dtype=np.int64)
    patterns = row_patterns(counts, sequence_length)
    sizes = [sum(pattern.documents.values()) for pattern in patterns]
    # Rows in the order of their patterns stand by length: `place` shuffles them.
    place = random.permutation(sum(pattern.rows for pattern in patterns))
    offsets = np.zeros(len(place) + 1, dtype=np.int64)
    offsets[place + 1] = np.repeat(sizes, [pattern.rows for pattern in patterns])
    np.cumsum(offsets, out=offsets)

    by_length, ends = _shuffled_by_length(lengths, counts, random), np.cumsum(counts)
    unused = (ends - counts).tolist()  # where the first document of each length stands that no row has yet
    documents = np.empty(len(lengths), dtype=np.int64)
    row = 0
    for pattern, size in zip(patterns, sizes, strict=True):
        parts = []
        for length, copies in pattern.documents.items():
            start = unused[length]
            unused[length] = end = start + pattern.rows * copies
            parts.append(by_length[start:end].reshape(pattern.rows, copies))
        starts = offsets[place[row : row + pattern.rows]]
        documents[starts[:, None] + np.arange(size)] = random.permuted(np.concatenate(parts, axis=1), axis=1)
        row += pattern.rows
    return Plan(documents, offsets)


def _check(lengths: npt.NDArray[np.integer], sequence_length: int) -> None:
    if not len(lengths):
        return
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    if lengths[longest] > sequence_length:
        raise DataError(
            f"document {longest} of the store has {int(lengths[longest]):,} tokens, more than "
            f"data.sequence_length {sequence_length:,}; run `bigtune prepare RUN.yaml` again"
        )
    if lengths[shortest] < 1:
        raise DataError(f"document {shortest} of the store has no tokens; run `bigtune prepare RUN.yaml` again")


def _shuffled_by_length(
    lengths: npt.NDArray[np.integer], counts: npt.NDArray[np.int64], random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """All documents by rising length, those of one length in random order."""
    # NumPy sorts 16 bits by radix, three times as fast as more.
    order = np.argsort(lengths.astype(np.uint16 if len(counts) <= 2**16 else np.uint32), kind="stable")
    start = 0
    for end in np.cumsum(counts[counts > 0]).tolist():
        random.shuffle(order[start:end])
        start = end
    return order


def row_patterns(counts: npt.NDArray[np.int64], sequence_length: int) -> list[Pattern]:
    """Pack `counts[n]` documents of n tokens, for each n, into few rows.

    A row begins with the longest document that is left and is then filled by the set of others that leaves the
    least room, found by dynamic programming (the MBS' heuristic: Fleszar and Hindi, 2002, Computers & Operations
    Research 29). Of sets that are as good, long documents come first: short ones, which fit anywhere, are kept
    for the end. No document that a later row holds would fit into an earlier one.
    """
    left: list[int] = counts.tolist()
    lengths: list[int] = np.flatnonzero(counts).tolist()  # those that are left, rising
    patterns = []
    while lengths:
        documents = {lengths[-1]: 1}
        room = sequence_length - lengths[-1]
        while room and (more := _fill(room, lengths, left, documents)):
            for length, copies in more.items():
                documents[length] = documents.get(length, 0) + copies
                room -= length * copies
        rows = min(left[length] // copies for length, copies in documents.items())
        for length, copies in documents.items():
            left[length] -= rows * copies
            if not left[length]:
                del lengths[bisect_left(lengths, length)]
        patterns.append(Pattern(documents, rows))
    return patterns


def _fill(room: int, lengths: list[int], left: list[int], taken: dict[int, int]) -> dict[int, int]:
    """Documents that leave the least of `room`, as length → number; none if nothing fits.

    Bit r of `reach` says that r tokens of room can remain; taking a document shifts the bits down by its length.
    Lengths are tried from the longest that fits, until the room is filled exactly or SEARCH_BITS are spent.
    """
    steps: list[tuple[int, int, int]] = []  # bits before, length, number of documents
    most_steps = max(16, SEARCH_BITS // room)
    reach = 1 << room
    for at in range(bisect_right(lengths, room) - 1, -1, -1):
        length = lengths[at]
        # Any number of the documents of this length, as sums of 1, 2, 4, … and a rest of them.
        free, part = min(left[length] - taken.get(length, 0), room // length), 1
        while free > 0 and not reach & 1:
            copies = min(part, free)
            steps.append((reach, length, copies))
            reach |= reach >> (length * copies)
            free, part = free - copies, 2 * part
        if reach & 1 or len(steps) >= most_steps:
            break
    rest = (reach & -reach).bit_length() - 1
    chosen: dict[int, int] = {}
    for before, length, copies in reversed(steps):
        if not before >> rest & 1:  # not reached without these
            chosen[length] = chosen.get(length, 0) + copies
            rest += length * copies
    return chosen
