"""Which of the documents in the parts are trained on: not those held out, not those that cleaning removes.

Nothing is rewritten for it: a choice is a list of positions, made from the parts' columns in seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.config import Clean
from bigtune.data.arrow import numpy_numbers
from bigtune.data.clean import Features, Removals, select
from bigtune.data.duplicates import Column, Signatures
from bigtune.data.features import features
from bigtune.data.holdout import bound
from bigtune.data.parts import Collected
from bigtune.data.recipe import Recipe
from bigtune.data.store import Columns

NOTHING_SUPERVISED = "nothing supervised"


@dataclass(frozen=True)
class Choice:
    """`chosen` int64, rising positions in the columns; the rest is told of in `removed` and the counts."""

    chosen: npt.NDArray[np.int64]
    removed: tuple[tuple[int, str, int | None], ...]  # position, reason, position of the row that it repeats
    counts: Mapping[str, int]  # rows removed, by reason
    held_out: int
    held_out_below: int
    silent_tokens: int  # of rows with nothing supervised
    duplicate_ids: int


@dataclass(frozen=True)
class Verdict:
    """On R rows of N documents, N being R or more."""

    kept: npt.NDArray[np.bool_]  # [N], documents
    held: npt.NDArray[np.bool_]  # [R], rows held out
    silent: npt.NDArray[np.bool_]  # [R], the others with nothing supervised
    cleaned: npt.NDArray[np.int64]  # rows that are neither, which cleaning looks at
    removals: Removals  # of `cleaned`
    silent_tokens: int

    def counts(self) -> dict[str, int]:
        """Rows that are left out though they are not held out, by reason."""
        silent = {NOTHING_SUPERVISED: int(self.silent.sum())} if self.silent.any() else {}
        return {**silent, **self.removals.counts()}


def choose(columns: Columns, clean: Clean, holdout: float | int | None) -> Choice:
    """Decide on every document; those of one row share its fate."""
    begins = columns.numbers("part") == 0
    first, owner = np.flatnonzero(begins), np.cumsum(begins) - 1
    content = columns.numbers("content")[first]
    below = bound(holdout, content)
    verdict = _judge(
        owner,
        content,
        columns.lengths(),
        columns.numbers("supervised"),
        lambda rows: _Features(columns, first[rows]),
        below,
        clean,
    )
    removed: list[tuple[int, str, int | None]] = [
        (int(first[row]), NOTHING_SUPERVISED, None) for row in np.flatnonzero(verdict.silent)
    ]
    at = first[verdict.cleaned]
    for i in np.flatnonzero(~verdict.removals.kept).tolist():
        removal = verdict.removals[i]
        assert removal is not None
        removed.append((int(at[i]), removal.reason, None if removal.like is None else int(at[removal.like])))
    ids = columns.numbers("id")[first]
    ids = ids[ids != 0]
    return Choice(
        chosen=np.flatnonzero(verdict.kept).astype(np.int64),
        removed=tuple(sorted(removed)),
        counts=verdict.counts(),
        held_out=int(verdict.held.sum()),
        held_out_below=below,
        silent_tokens=verdict.silent_tokens,
        duplicate_ids=len(ids) - len(np.unique(ids)),
    )


def choose_collected(collected: Collected, recipe: Recipe, below: int) -> Verdict:
    """The same for the documents of one chunk, where rows are judged one by one."""
    made = features(collected.conversations, recipe.clean, recipe.overlap)
    columns = {name: numpy_numbers(column) for name, column in made.items()}
    return _judge(
        np.array(collected.owners, dtype=np.int64),
        np.array([conversation.content_hash for conversation in collected.conversations], dtype=np.uint64),
        np.array([len(document) for document in collected.documents], dtype=np.int32),
        np.array([document.supervised for document in collected.documents], dtype=np.int32),
        lambda rows: {name: column[rows] for name, column in columns.items()},
        below,
        recipe.clean,
    )


def _judge(
    owner: npt.NDArray[np.int64],
    content: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int32],
    supervised: npt.NDArray[np.int32],
    features_of: Callable[[npt.NDArray[np.int64]], Features],
    below: int,
    clean: Clean,
) -> Verdict:
    """`owner` [N] gives the row of each document; `content` [R] is of rows, `lengths` and `supervised` [N] in tokens.

    `features_of` gives the features of some rows.
    """
    rows = len(content)
    held = content < np.uint64(below)
    silent = ~held & ~(np.bincount(owner, weights=supervised > 0, minlength=rows) > 0)
    longest = np.zeros(rows, dtype=np.int64)
    np.maximum.at(longest, owner, lengths)
    cleaned = np.flatnonzero(~held & ~silent)
    removals = select(features_of(cleaned), content[cleaned], longest[cleaned], clean)
    kept = np.zeros(rows, dtype=bool)
    kept[cleaned] = removals.kept
    silent_tokens = int(lengths[silent[owner]].sum(dtype=np.int64))
    return Verdict(kept[owner] & (supervised > 0), held, silent, cleaned, removals, silent_tokens)


class _Features:
    """Feature columns at some positions only, each read when it is asked for."""

    def __init__(self, columns: Columns, positions: npt.NDArray[np.int64]) -> None:
        self._columns, self._positions = columns, positions

    def __getitem__(self, name: str) -> Column:
        if name == "minhash":  # too large to be read at once
            return _At(Signatures(self._columns.chunked(name)), self._positions)
        column: Column = self._columns.numbers(name)[self._positions]
        return column


@dataclass(frozen=True)
class _At:
    """A column at some positions only."""

    column: Column
    positions: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: Any, /) -> Any:
        return self.column[self.positions[rows]]
