"""Packed rows and the position among them: what a prepared store and a stream of raw files have in common.

A position knows nothing of ranks: what is read next is the same for any number of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bigtune.data.document import Document
from bigtune.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Position:
    """The next row to be read, all from 0.

    In a prepared store `row` is a row of the plan of `epoch`; in a stream of raw files it is a row of a
    window of a shard.
    """

    epoch: int = 0
    row: int = 0
    shard: int = 0
    window: int = 0

    def to_json(self) -> dict[str, int]:
        return {"epoch": self.epoch, "shard": self.shard, "window": self.window, "row": self.row}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Position":
        """Raises CheckpointError if the tree is no position."""
        numbers = [tree.get(name) for name in ("epoch", "row", "shard", "window")]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(
                f"data position {dict(tree)!r}: epoch, shard, window and row must be whole numbers from 0"
            )
        return cls(*numbers)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: its documents (or pieces of them), and for each a number that no other has in an epoch.

    `places` are the files and rows that they come from, where that is known without looking it up.
    """

    indices: tuple[int, ...]
    documents: tuple[Document, ...]
    places: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def work(self) -> int:
        """Attention work: the sum of squared document lengths."""
        return sum(len(document) ** 2 for document in self.documents)

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return sum(document.supervised for document in self.documents)


class Rows(Protocol):
    """Packed rows in an order that depends on the seed alone."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints, equal rows at equal positions (but for the seed)."""

    @property
    def documents(self) -> str:
        """A fingerprint of the documents alone, however they are packed."""

    @property
    def chat_template(self) -> str | None:
        """The template that made the documents, if it is not the tokenizer's own."""

    @property
    def highest_token(self) -> int:
        """No token of the documents is higher."""

    def longest(self) -> tuple[int, str]:
        """Tokens of the longest document, and where it comes from."""

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        """The next `count` rows from `position` on, and the position after them; fewer where the stream ends."""

    def where(self, row: Row) -> tuple[str, ...]:
        """The files and rows that a packed row's documents come from, for a message."""

    def epochs_at(self, position: Position) -> float:
        """How many epochs were read before a position; 1.5 in the middle of the second."""

    def describe(self) -> str:
        """What the rows are like, for the head of a run."""

    def losses(self) -> str:
        """What of the sources was left out on the way so far; empty where that is nothing, or told before."""

    def close(self) -> None:
        """End the processes that make the rows."""
