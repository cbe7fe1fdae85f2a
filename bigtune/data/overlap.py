"""Held-out rows as a set of n-grams: what training documents must not share with them.

The method is that of GPT-3 (Brown et al. 2020, appendix C): words without case and punctuation, and a document
overlaps when it shares n of them in a row with a held-out one. Two rules keep it from removing what is no leak:

- Held-out questions of fewer than n words count where a conversation opens with the same one, whole; with fewer than
  4 words they do not count. Short answers never do: "The answer is no." in two rows gives nothing away.
- What more than 10 held-out rows and more than 1% of them share is boilerplate (an instruction before every
  question, a licence) and does not count. The paper leaves out what it met in more than 10 training documents.
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from bigtune.data.conversation import Conversation
from bigtune.data.words import UInt64s, Words, ngrams, spoken

SHORTEST_QUESTION = 4  # words
BOILERPLATE_ROWS, BOILERPLATE_SHARE = 10, 0.01
BATCH = 1000  # conversations hashed at once


@dataclass(frozen=True, eq=False)
class Overlap:
    """Hashes of held-out rows, small enough to be sent to worker processes.

    `grams` uint64 [G] are those of `words` words in a row, `wholes` uint64 [Q] those of shorter questions; both
    sorted, without repetitions.
    """

    words: int
    grams: UInt64s
    wholes: UInt64s

    @classmethod
    def of(cls, conversations: Iterable[Conversation], words: int) -> Self:
        """The n-grams of `conversations`, n being `words`. Their order does not matter."""
        grams: list[UInt64s] = []
        wholes: list[UInt64s] = []
        rows, source = 0, iter(conversations)
        while batch := list(itertools.islice(source, BATCH)):
            held_out = Words.of([spoken(conversation) for conversation in batch])
            every = ngrams(held_out.hashes, words)
            owner = held_out.rows_of(np.arange(len(every)), words)
            grams.append(_once_a_row(every[owner >= 0], owner[owner >= 0]))
            wholes.append(_wholes(held_out, words)[0])
            rows += len(batch)
        most = max(BOILERPLATE_ROWS, int(BOILERPLATE_SHARE * rows))
        return cls(words, _rare(grams, most), _rare(wholes, most))

    @cached_property
    def identity(self) -> str:
        """What was held out, in 64 hexadecimal digits: equal ones mark the same documents."""
        total = hashlib.sha256(f"{self.words} {len(self.grams)} {len(self.wholes)}\n".encode())
        for hashes in (self.grams, self.wholes):
            total.update(np.ascontiguousarray(hashes, "<u8").tobytes())
        return total.hexdigest()

    def touched(self, documents: Words) -> npt.NDArray[np.int64]:
        """The conversations of `documents` that overlap, in any order, with repetitions."""
        starts = np.flatnonzero(_isin(ngrams(documents.hashes, self.words), self.grams))
        rows = documents.rows_of(starts, self.words)
        wholes, owners = _wholes(documents, self.words)
        return np.concatenate([rows[rows >= 0], owners[_isin(wholes, self.wholes)]])


def _wholes(documents: Words, n: int) -> tuple[UInt64s, npt.NDArray[np.int64]]:
    """Hashes of the questions of 4 to n - 1 words [Q], and the conversations that they open [Q]."""
    short = documents.questions & (documents.lengths >= SHORTEST_QUESTION) & (documents.lengths < n)
    asked = np.flatnonzero(short)
    hashes = [ngrams(documents.turn(i), int(documents.lengths[i])) for i in asked.tolist()]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64), documents.rows[asked]


def _once_a_row(grams: UInt64s, rows: npt.NDArray[np.int64]) -> UInt64s:
    """`grams` [K] without those that stand in the same row already; sorted."""
    order = np.lexsort((rows, grams))
    grams, rows = grams[order], rows[order]
    first = np.ones(len(grams), np.bool_)
    first[1:] = (grams[1:] != grams[:-1]) | (rows[1:] != rows[:-1])
    return grams[first]


def _rare(hashes: list[UInt64s], most: int) -> UInt64s:
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
    return values[counts <= most]


def _isin(values: UInt64s, table: UInt64s) -> npt.NDArray[np.bool_]:
    """Which of `values` [K] are in the sorted `table`: bool [K]."""
    if not len(table):
        return np.zeros(len(values), np.bool_)
    found: npt.NDArray[np.bool_] = table[np.searchsorted(table, values).clip(max=len(table) - 1)] == values
    return found
