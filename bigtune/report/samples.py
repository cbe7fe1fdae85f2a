"""Documents as the model reads them: some drawn from an epoch, and those of its first rows."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bigtune.data.choose import NOTHING_SUPERVISED
from bigtune.data.document import Document
from bigtune.data.rows import Position
from bigtune.data.store import Store
from bigtune.data.stream import RowStream
from bigtune.report.inspection import PackedRow, Sample
from bigtune.report.tokens import Reader


def draw(sources: npt.NDArray[np.integer], count: int, seed: int) -> list[int]:
    """Positions of `count` of N things, by turns from each source that has some; `sources` [N] is each one's source."""
    random = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    lots = []
    for source in np.unique(sources):
        mine = np.flatnonzero(sources == source)
        lots.append(mine[random.choice(len(mine), min(count, len(mine)), replace=False)].tolist())
    turns = [lot[turn] for turn in range(count) for lot in lots if turn < len(lot)]
    return turns[:count]


def sample_epoch(
    store: Store, stream: RowStream, drawn: npt.NDArray[np.int64], count: int, seed: int, reader: Reader
) -> Iterator[Sample]:
    """Some of the pieces that an epoch draws, as they are packed."""
    for i in draw(store.sources[stream.pieces.document[drawn]], count, seed):
        piece = int(drawn[i])
        start, length = int(stream.pieces.start[piece]), int(stream.pieces.length[piece])
        document = store.document(int(stream.pieces.document[piece])).piece(start, length)
        yield _piece(store, stream, piece, document, reader)


def sample_silent(store: Store, count: int, seed: int, reader: Reader) -> Iterator[Sample]:
    """Documents in which nothing is supervised; how that comes about is worth seeing."""
    everything = every_document(store)
    silent = np.flatnonzero(everything.supervised == 0)
    for i in draw(everything.sources[silent], count, seed):
        at = int(silent[i])
        yield Sample(everything.where(at), f"left out: {NOTHING_SUPERVISED}", reader.read(everything.document(at)))


def sample_store(store: Store, count: int, seed: int, reader: Reader) -> Iterator[Sample]:
    """Some documents of a store, whole."""
    for i in draw(store.sources, count, seed):
        yield Sample(store.where(i), "", reader.read(store.document(i)))


def first_rows(store: Store, stream: RowStream, count: int, reader: Reader) -> Iterator[PackedRow]:
    """The first rows of the first epoch."""
    taken, _ = stream.take(Position(), min(count, stream.plan(0)[0].rows))
    for number, row in enumerate(taken):
        pieces = zip(row.indices, row.documents, strict=True)
        documents = tuple(_piece(store, stream, i, document, reader) for i, document in pieces)
        yield PackedRow(number, stream.sequence_length, documents)


def every_document(store: Store) -> Store:
    """All documents that were made, those that are not trained on too."""
    return Store(store.path, store.manifest, store.columns, np.arange(len(store.columns), dtype=np.int64))


def _piece(store: Store, stream: RowStream, piece: int, document: Document, reader: Reader) -> Sample:
    pieces = stream.pieces
    of, start, length = int(pieces.document[piece]), int(pieces.start[piece]), int(pieces.length[piece])
    whole = len(store.document(of))
    note = "" if whole == length else f"its tokens {start + 1:,} to {start + length:,} of {whole:,}"
    return Sample(store.where(of), note, reader.read(document))
