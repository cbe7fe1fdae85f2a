"""Which of the documents in the parts are trained on: not those held out, not those that cleaning removes.

Nothing is rewritten for it: a choice is a list of positions, made from the parts' columns in seconds.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.config import Clean
from bigtune.data.clean import select
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
    duplicate_ids: int


def choose(columns: Columns, clean: Clean, holdout: float | int | None) -> Choice:
    """Decide on every document; those of one row share its fate."""
    first = np.flatnonzero(columns.numbers("part") == 0)  # one a row
    owner = np.cumsum(columns.numbers("part") == 0) - 1
    content, supervised = columns.numbers("content"), columns.numbers("supervised")
    below = bound(holdout, content[first])
    held = content[first] < np.uint64(below)
    learnt = np.bincount(owner, weights=supervised > 0, minlength=len(first)) > 0
    candidates = np.flatnonzero(~held & learnt)
    at = first[candidates]
    removals = select(
        _Features(columns, at), content[at], _longest(owner, columns.lengths(), len(first))[candidates], clean
    )
    kept = np.zeros(len(first), dtype=bool)
    kept[candidates] = removals.kept
    chosen = np.flatnonzero(kept[owner] & (supervised > 0)) if len(owner) else np.empty(0, np.int64)
    silent = np.flatnonzero(~held & ~learnt)
    counts = {NOTHING_SUPERVISED: len(silent)} if len(silent) else {}
    removed: list[tuple[int, str, int | None]] = [(int(first[row]), NOTHING_SUPERVISED, None) for row in silent]
    for i in np.flatnonzero(~removals.kept).tolist():
        removal = removals[i]
        assert removal is not None
        removed.append((int(at[i]), removal.reason, None if removal.like is None else int(at[removal.like])))
    ids = columns.numbers("id")[first]
    ids = ids[ids != 0]
    return Choice(
        chosen=chosen.astype(np.int64),
        removed=tuple(sorted(removed)),
        counts={**counts, **removals.counts()},
        held_out=int(held.sum()),
        held_out_below=below,
        duplicate_ids=len(ids) - len(np.unique(ids)),
    )


def _longest(owner: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], rows: int) -> npt.NDArray[np.int64]:
    """The longest document of each row."""
    tokens = np.zeros(rows, dtype=np.int64)
    np.maximum.at(tokens, owner, lengths)
    return tokens


def choose_collected(collected: Collected, recipe: Recipe, below: int, lost: Counter[str]) -> npt.NDArray[np.bool_]:
    """The same for the documents of one chunk, where rows are judged one by one; counts what is left out in `lost`."""
    owners = np.array(collected.owners, dtype=np.int64)
    supervised = np.array([document.supervised for document in collected.documents], dtype=np.int64)
    content = np.array([conversation.content_hash for conversation in collected.conversations], dtype=np.uint64)
    lengths = np.array([len(document.input_ids) for document in collected.documents], dtype=np.int32)
    learnt = np.bincount(owners, weights=supervised > 0, minlength=len(content)) > 0
    held = content < np.uint64(below)
    made = features(collected.conversations, recipe.clean, recipe.overlap)
    columns = {name: column.to_numpy(zero_copy_only=False) for name, column in made.items()}
    removals = select(columns, content, _longest(owners, lengths, len(content)), recipe.clean)
    lost.update(removals.counts())
    lost.update({NOTHING_SUPERVISED: int((~learnt & ~held).sum()), "held out": int(held.sum())})
    return (removals.kept & ~held)[owners] & (supervised > 0)


class _Features(Mapping[str, Column]):
    """Feature columns at some positions only, each read when it is asked for."""

    def __init__(self, columns: Columns, positions: npt.NDArray[np.int64]) -> None:
        self._columns, self._positions = columns, positions

    def __getitem__(self, name: str) -> Column:
        if name == "minhash":  # too large to be read at once
            return _At(Signatures(self._columns.chunked(name)), self._positions)
        column: Column = self._columns.numbers(name)[self._positions]
        return column

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)


@dataclass(frozen=True)
class _At:
    """A column at some positions only."""

    column: Column
    positions: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: Any, /) -> Any:
        return self.column[self.positions[rows]]
