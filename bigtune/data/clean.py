"""Which documents are left out of training, decided from stored columns in document order.

    workers:  conversations ──features──▶ columns beside the tokens
    main:     columns, content hashes, lengths ──select──▶ Removals (nothing is rewritten)

A row goes for the first of these reasons that applies. First come those that lie in the row alone: its length, short
answers, repetition, overlap with held-out rows. Then, in document order, those that lie in earlier rows: the same
content, nearly the same words, the same answer too often. Earlier rows count only if they were kept, so a removed row
never takes another one with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bigtune.config import Clean
from bigtune.data.duplicates import Column, Equal, Near

NOT_REMOVED = -1


@dataclass(frozen=True)
class Removal:
    """Why a row is left out. `like` is the index of the kept row that it repeats, None if it repeats none."""

    reason: str
    like: int | None


@dataclass(frozen=True, eq=False)
class Removals:
    """What cleaning left out of N documents.

    `names` are the reasons that the settings turn on, in the order in which they are tried; `reason` int8 [N] is an
    index into them, and `like` int64 [N] the kept document that one repeats; both are -1 where there is none.
    """

    names: tuple[str, ...]
    reason: npt.NDArray[np.int8]
    like: npt.NDArray[np.int64]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """bool [N]."""
        kept: npt.NDArray[np.bool_] = self.reason == NOT_REMOVED
        return kept

    def counts(self) -> dict[str, int]:
        """Removed rows by reason, zeros included, in the order of `names`."""
        counts = np.bincount(self.reason[~self.kept], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def __getitem__(self, row: int) -> Removal | None:
        """Why `row` is left out; None if it is kept."""
        if self.reason[row] == NOT_REMOVED:
            return None
        like = int(self.like[row])
        return Removal(self.names[self.reason[row]], like if like >= 0 else None)


class Features(Protocol):
    """Feature columns by name, as a dictionary or read when they are asked for."""

    def __getitem__(self, name: str, /) -> Column: ...


def select(
    columns: Features, content: npt.NDArray[np.uint64], tokens: npt.NDArray[np.integer], clean: Clean
) -> Removals:
    """Decide which of N documents are left out.

    Args:
        columns: of `features`, each [N]; all but `minhash` [N, 128] are read whole.
        content: `Conversation.content_hash` of each document, uint64 [N].
        tokens: length of each document, [N].
    """
    reason = np.full(len(content), NOT_REMOVED, np.int8)
    like = np.full(len(content), -1, np.int64)
    names: list[str] = []
    for name, unwanted in _filters(columns, tokens, clean):
        reason[unwanted & (reason == NOT_REMOVED)] = len(names)
        names.append(name)
    checks: list[tuple[int, Equal | Near]] = []
    for name, check in _checks(columns, content, np.flatnonzero(reason == NOT_REMOVED), clean):
        checks.append((len(names), check))
        names.append(name)
    may_repeat = np.zeros(len(content), np.bool_)
    for _, check in checks:
        may_repeat[check.rows] = True
    for row in np.flatnonzero(may_repeat).tolist():
        for index, check in checks:
            if (earlier := check.earlier(row)) >= 0:
                reason[row], like[row] = index, earlier
                break
        else:
            for _, check in checks:
                check.keep(row)
    return Removals(tuple(names), reason, like)


def _filters(
    columns: Features, tokens: npt.NDArray[np.integer], clean: Clean
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Reasons that lie in a row alone, and the rows that they remove, bool [N]."""
    if clean.min_tokens is not None:
        yield f"fewer than {clean.min_tokens:,} tokens", tokens < clean.min_tokens
    if clean.max_tokens is not None:
        yield f"more than {clean.max_tokens:,} tokens", tokens > clean.max_tokens
    if clean.min_answer_characters is not None:
        short = np.asarray(columns["answer_characters"][:]) < clean.min_answer_characters
        yield f"answers of fewer than {clean.min_answer_characters:,} characters", short
    if clean.max_repetition is not None:
        # The column has 32 bits: compare with the threshold in as many.
        repetitive = np.asarray(columns["repetition"][:]) > np.float32(clean.max_repetition)
        yield f"over {clean.max_repetition * 100:g}% of an answer's 4-grams repeated", repetitive
    if clean.decontaminate is not None:
        yield "overlaps held-out rows", np.asarray(columns["overlaps"][:], np.bool_)


def _checks(
    columns: Features, content: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64], clean: Clean
) -> Iterator[tuple[str, Equal | Near]]:
    """Reasons that lie in earlier rows; `rows` are those that are left."""
    if clean.exact_duplicates:
        yield "exact duplicate", Equal(content, rows, 1)
    if clean.near_duplicates is not None:
        yield "near duplicate", Near(columns["minhash"], rows, clean.near_duplicates)
    if clean.same_answer_at_most is not None:
        quota = clean.same_answer_at_most
        yield f"same answer as {quota:,} earlier", Equal(np.asarray(columns["answer"][:]), rows, quota)
