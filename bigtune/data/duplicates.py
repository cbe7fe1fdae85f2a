"""Which rows repeat an earlier one, asked in document order against the rows that were kept.

`Equal` and `Near` have the same three parts: `rows`, those that may repeat another (most rows cannot, and are never
asked about); `earlier(row)`, the kept row that this one repeats; and `keep(row)`.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bigtune.data.arrow import numpy_numbers

Rows = npt.NDArray[np.int64]

EMPTY = np.iinfo(np.uint32).max  # the MinHash value of no element
_KEYS_AT_ONCE = 8  # bands whose keys are held in memory: 64 bytes a row
_ROWS_AT_ONCE = 1 << 14  # signatures read at once: 8 MiB
_COMPARED = 256  # kept rows of a bucket that a row is compared to: bounds the work where all rows share a bucket


class Column(Protocol):
    """A column that is read in parts: takes a slice, a row or an int64 array of rows, as a NumPy array does."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class Equal:
    """Rows with the same value as `quota` kept ones, which is exact."""

    def __init__(self, values: npt.NDArray[np.uint64], rows: Rows, quota: int) -> None:
        """`values` uint64 [N]; `rows` are those that are left."""
        _, inverse, counts = np.unique(values[rows], return_inverse=True, return_counts=True)
        self.rows = rows[counts[inverse] > quota]
        self._quota = quota
        self._group = np.full(len(values), -1, np.int32)
        self._group[rows] = np.where(counts[inverse] > quota, inverse, -1)
        self._first = np.full(len(counts), -1, np.int64)
        self._kept = np.zeros(len(counts), np.int32)

    def earlier(self, row: int) -> int:
        """The first kept row with this value, if as many as the quota were kept; else -1."""
        group = self._group[row]
        return int(self._first[group]) if group >= 0 and self._kept[group] >= self._quota else -1

    def keep(self, row: int) -> None:
        group = self._group[row]
        if group >= 0:
            self._first[group] = row if self._kept[group] == 0 else self._first[group]
            self._kept[group] += 1


class Near:
    """Rows whose MinHash signature agrees with a kept one's in at least `threshold` of its values.

    Signatures are cut into bands of some values each, and only rows that agree in a whole band are compared
    (locality-sensitive hashing; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). Compared
    rows are judged by the whole signature, so banding can only miss a pair, never make one up.
    """

    def __init__(self, signatures: Column, rows: Rows, threshold: float) -> None:
        """`signatures` uint32 [N, P]; `rows` are those that are left."""
        self._signatures = signatures
        self._needed = threshold * signatures[0:1].shape[1]
        members, buckets = _shared_buckets(signatures, rows, *bands(threshold, signatures[0:1].shape[1]))
        order = np.argsort(members, kind="stable")
        self._buckets = buckets[order]  # of the rows, one after the other
        of_row = np.bincount(members, minlength=len(signatures))
        self.rows = np.flatnonzero(of_row)
        self._starts = np.concatenate([[0], np.cumsum(of_row)])
        # The kept rows of bucket b are slots[offset[b] : offset[b] + kept[b]].
        of_bucket = np.bincount(buckets)
        self._offset = np.cumsum(of_bucket) - of_bucket
        self._kept = np.zeros(len(of_bucket), np.int32)
        self._slots = np.empty(len(members), np.int32)

    def earlier(self, row: int) -> int:
        """The most similar kept row, of equals the first; -1 if none is similar enough."""
        parts = []
        for bucket in self._buckets[self._starts[row] : self._starts[row + 1]].tolist():
            kept, offset = int(self._kept[bucket]), int(self._offset[bucket])
            if kept:
                parts.append(self._slots[offset + max(0, kept - _COMPARED) : offset + kept])
        if not parts:
            return -1
        others = np.unique(np.concatenate(parts)).astype(np.int64)
        agreeing = np.count_nonzero(self._signatures[others] == self._signatures[row], axis=1)
        best = int(agreeing.argmax())
        return int(others[best]) if agreeing[best] >= self._needed else -1

    def keep(self, row: int) -> None:
        for bucket in self._buckets[self._starts[row] : self._starts[row + 1]].tolist():
            self._slots[self._offset[bucket] + self._kept[bucket]] = row
            self._kept[bucket] += 1


def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Number of bands, and values a band: datasketch's optimum where a missed pair weighs 9 times an idle comparison.

    At a threshold of 0.8 these are 14 and 9: of pairs with similarity 0.8, 0.85 and 0.9, 87%, 97.5% and 99.8% meet.
    """
    from datasketch import MinHashLSH  # type: ignore[import-untyped]  # here: it takes scipy along

    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.1, 0.9))
    return index.b, index.r


def _shared_buckets(
    signatures: Column, rows: Rows, count: int, width: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Memberships of the buckets that at least two rows are in: rows int32 [E] and buckets int32 [E], in their order.

    Rows without any words are in none.
    """
    members, buckets, total = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for first in range(0, count, _KEYS_AT_ONCE):
        keys, empty = _keys(signatures, range(first, min(first + _KEYS_AT_ONCE, count)), width)
        usable = rows[~empty[rows]]
        for of_band in keys:
            key = of_band[usable]
            order = np.argsort(key)
            key = key[order]
            new = np.ones(len(key) + 1, np.bool_)
            new[1:-1] = key[1:] != key[:-1]
            shared = ~(new[:-1] & new[1:])
            members.append(usable[order[shared]].astype(np.int32))
            bucket = np.cumsum(new[:-1][shared], dtype=np.int32) - 1 + np.int32(total)
            buckets.append(bucket)
            total = int(bucket[-1]) + 1 if len(bucket) else total
    return np.concatenate(members), np.concatenate(buckets)


def _keys(signatures: Column, which: range, width: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """A key of each band in `which`, uint64 [bands, N], and the rows of the empty set, bool [N]."""
    keys = np.zeros((len(which), len(signatures)), np.uint64)
    empty = np.zeros(len(signatures), np.bool_)
    for start in range(0, len(signatures), _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, len(signatures)))
        values = np.asarray(signatures[part])
        empty[part] = values.min(axis=1) == EMPTY
        for key, band in zip(keys, which, strict=True):
            for column in range(band * width, (band + 1) * width):
                key[part] = key[part] * np.uint64(0x9E3779B97F4A7C15) + values[:, column]
    return keys, empty


class Signatures:
    """The `minhash` column of a store, chunk by chunk and without a copy, as `Near` reads it."""

    def __init__(self, column: Any) -> None:
        """`column` is a `pa.ChunkedArray` of fixed-size lists, as the memory-mapped file gives it."""
        self._chunks = [numpy_numbers(chunk.flatten()).reshape(len(chunk), -1) for chunk in column.chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        self._width = column.type.list_size

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Any, /) -> npt.NDArray[np.uint32]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        if np.ndim(rows) == 0:
            chunk = int(np.searchsorted(self._starts, rows, side="right")) - 1
            values: npt.NDArray[np.uint32] = self._chunks[chunk][rows - self._starts[chunk]]
            return values
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        result = np.empty((len(rows), self._width), np.uint32)
        for chunk in np.unique(chunks).tolist():
            at = chunks == chunk
            result[at] = self._chunks[chunk][rows[at] - self._starts[chunk]]
        return result
