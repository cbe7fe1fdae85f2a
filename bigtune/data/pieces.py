"""What rows are packed from: the store's documents, cut to a sequence length, and an epoch's share of them.

    store ──cut──▶ pieces ──draw (caps, weights; seed, epoch)──▶ the pieces of an epoch ──▶ plan

All of it is arithmetic on lengths, so that a new length, seed or mixture needs no new tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bigtune.config import Data, TrainingSource
from bigtune.data.document import Document
from bigtune.data.store import Store
from bigtune.errors import DataError


class Documents(Protocol):
    """Documents that can be cut: those of a store, or of a window of a stream."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]: ...

    @property
    def supervised(self) -> npt.NDArray[np.int32]: ...

    def document(self, i: int) -> Document: ...

    def where(self, i: int) -> str: ...


@dataclass(frozen=True)
class Pieces:
    """P pieces of documents, in the documents' order; most documents are one piece."""

    document: npt.NDArray[np.int64]  # [P], in the store
    start: npt.NDArray[np.int32]  # [P], the first token
    length: npt.NDArray[np.int32]  # [P], tokens
    supervised: npt.NDArray[np.int32]  # [P], tokens
    dropped: Mapping[str, int]  # documents and pieces that are left out, by reason
    truncated: int  # documents that lost their end
    split: int  # documents that became several pieces

    def __len__(self) -> int:
        return len(self.document)

    def notes(self, sequence_length: int) -> list[str]:
        """What was done to long documents, a line each."""
        notes = [f"dropped {count:,} ({reason})" for reason, count in self.dropped.items()]
        if self.truncated:
            notes.append(f"truncated {self.truncated:,} documents to {sequence_length:,} tokens")
        if self.split:
            notes.append(f"split {self.split:,} documents into pieces of {sequence_length:,} tokens")
        return notes


def cut(documents: Documents, data: Data) -> Pieces:
    """Cut documents longer than `data.sequence_length` as `data.on_long_document` says.

    Pieces of a split document overlap by one token, which the next piece needs to predict its own first one:
    so every supervised token is learnt exactly once.

    Raises:
        DataError: a document is too long and that is an error.
    """
    room, lengths, supervised = data.sequence_length, documents.lengths, documents.supervised
    long = np.flatnonzero(lengths > room)
    if len(long) and data.on_long_document == "error":
        worst = int(long[0])
        raise DataError(
            f"{documents.where(worst)}: {int(lengths[worst]):,} tokens, more than data.sequence_length {room:,}; "
            "raise it, or set data.on_long_document: drop, truncate or split"
        )
    short = np.flatnonzero(lengths <= room)
    dropped = {}
    of, starts = np.empty(0, np.int64), np.empty(0, np.int64)
    if data.on_long_document == "truncate":
        of, starts = long, np.zeros(len(long), np.int64)
    elif data.on_long_document == "split":
        counts = -(-(lengths[long].astype(np.int64) - 1) // (room - 1))
        of = np.repeat(long, counts)
        starts = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * (room - 1)
    elif len(long):
        dropped[f"documents longer than {room:,} tokens"] = len(long)
    sizes = np.minimum(lengths[of] - starts, room)
    learnt = _supervised(documents, of, starts, sizes)
    if silent := int((learnt == 0).sum()):
        dropped[f"{'ends' if data.on_long_document == 'truncate' else 'pieces'} with nothing supervised"] = silent
    kept = learnt > 0
    document = np.concatenate([short, of[kept]])
    order = np.argsort(document, kind="stable")
    return Pieces(
        document=document[order],
        start=np.concatenate([np.zeros(len(short)), starts[kept]]).astype(np.int32)[order],
        length=np.concatenate([lengths[short], sizes[kept]]).astype(np.int32)[order],
        supervised=np.concatenate([supervised[short], learnt[kept]]).astype(np.int32)[order],
        dropped=dropped,
        truncated=int(kept.sum()) if data.on_long_document == "truncate" else 0,
        split=len(long) if data.on_long_document == "split" else 0,
    )


def _supervised(
    documents: Documents, of: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Supervised tokens of pieces [P]; `Document.piece` does the same to one."""
    if not len(of):
        return np.empty(0, np.int64)
    cut_up, which = np.unique(of, return_inverse=True)
    # The documents end to end, so that all spans are numbers on one line.
    ends = np.cumsum(documents.lengths[cut_up], dtype=np.int64)
    begins = ends - documents.lengths[cut_up]
    spans = np.concatenate(
        [documents.document(i).spans + begin for i, begin in zip(cut_up.tolist(), begins, strict=True)]
    )
    until = np.concatenate([np.zeros(1, np.int64), np.cumsum(spans[:, 1] - spans[:, 0])])

    def before(place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Supervised tokens before a place on the line."""
        begun = np.searchsorted(spans[:, 0], place)
        last_end = np.concatenate([np.zeros(1, np.int64), spans[:, 1]])[begun]
        counted: npt.NDArray[np.int64] = until[begun] - (last_end - place).clip(0)
        return counted

    first = begins[which] + starts
    return before(first + sizes) - before(first + 1)  # nothing in a piece predicts its first token


class Mixture:
    """Which pieces an epoch has: all of them, or each source's share."""

    def __init__(self, store: Store, pieces: Pieces, data: Data, seed: int) -> None:
        self._seed, self._pieces = seed, pieces
        self._groups: list[npt.NDArray[np.int64]] = []  # each source's pieces, in the order of their turns
        self._counts: list[int] = []
        self.names = [source.name for source in data.sources]
        self._source = store.sources[pieces.document]
        if any(source.weight or source.max_documents for source in data.sources):
            self._share(store, data.sources, data.mixture == "all_exhausted")

    @property
    def varies(self) -> bool:
        """Whether epochs differ in what they have, and not in its order alone."""
        return any(count != len(group) for group, count in zip(self._groups, self._counts, strict=True))

    def draw(self, epoch: int) -> npt.NDArray[np.int64]:
        """The pieces of an epoch, as positions, rising.

        A source that gives a part of its pieces gives the next part in the next epoch; one that gives more
        than all repeats some.
        """
        if not self._groups:
            return np.arange(len(self._pieces))
        drawn = []
        for group, count in zip(self._groups, self._counts, strict=True):
            drawn.append(group[(np.arange(count) + epoch * count) % len(group)] if len(group) else group)
        return np.sort(np.concatenate(drawn))

    def proportions(self, drawn: npt.NDArray[np.int64]) -> list[tuple[str, int, int, float]]:
        """(source, pieces, tokens, share of the tokens) of what was drawn."""
        tokens = np.bincount(self._source[drawn], weights=self._pieces.length[drawn], minlength=len(self.names))
        counts = np.bincount(self._source[drawn], minlength=len(self.names))
        total = max(1.0, float(tokens.sum()))
        return [
            (name, int(count), int(some), float(some) / total)
            for name, count, some in zip(self.names, counts, tokens, strict=True)
        ]

    def _share(self, store: Store, sources: Sequence[TrainingSource], all_exhausted: bool) -> None:
        turn = _mix(store.content ^ _mix(np.full(len(store), self._seed, np.uint64)))  # a document's, in any epoch
        for i, source in enumerate(sources):
            documents = np.flatnonzero(store.sources == i)
            if source.max_documents is not None:
                documents = documents[np.argsort(turn[documents], kind="stable")[: source.max_documents]]
            mine = np.flatnonzero(np.isin(self._pieces.document, documents))
            self._groups.append(mine[np.argsort(turn[self._pieces.document[mine]], kind="stable")])
        tokens = [int(self._pieces.length[group].sum(dtype=np.int64)) for group in self._groups]
        weights = [source.weight for source in sources]
        if weights[0] is None:
            self._counts = [len(group) for group in self._groups]
            return
        for source, some in zip(sources, tokens, strict=True):
            if not some:
                raise DataError(f"{source.name}: gives no document, but has a weight in the mixture; remove the source")
        reach = [some / (weight or 1) for some, weight in zip(tokens, weights, strict=True)]  # tokens a unit of weight
        unit = max(reach) if all_exhausted else min(reach)
        self._counts = [
            max(1, round(len(group) * (weight or 1) * unit / some))
            for group, weight, some in zip(self._groups, weights, tokens, strict=True)
        ]


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (numbers + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
