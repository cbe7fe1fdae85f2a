"""One window of a stream: some blocks of raw rows, tokenised and packed together. Worker processes run this."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtune.config import Data
from bigtune.data.choose import choose_collected
from bigtune.data.conversation import hash64
from bigtune.data.document import Document
from bigtune.data.files import Block, Chunk, read_block
from bigtune.data.formats import bad_row_error
from bigtune.data.parts import collect
from bigtune.data.pieces import cut
from bigtune.data.plan import plan_rows
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Position, Row
from bigtune.data.sources import UnreadableFile

CHUNK_BYTES = 2**24
"""Of a block that is tokenised at once; most are far smaller."""


@dataclass(frozen=True, slots=True)
class Item:
    """A block that is still to be read, or a chunk of one that was."""

    block: Block
    chunk: Chunk | None = None

    @property
    def size(self) -> int:
        """In bytes, about."""
        return self.block.size if self.chunk is None else self.chunk.size

    def chunks(self) -> Iterator[Chunk]:
        """Its rows. They are counted from the block's start, which the file's name then tells of."""
        block, file = self.block, self.block.file
        unit = "byte" if file.kind == "jsonl" else "block"
        path = file.path if block.whole else f"{file.path} (from {unit} {block.start:,} on)"
        for chunk in [self.chunk] if self.chunk else read_block(block, CHUNK_BYTES):
            yield dataclasses.replace(chunk, file=dataclasses.replace(file, path=path))


@dataclass(frozen=True)
class Window:
    """What the blocks of one window became."""

    rows: list[Row]
    lost: dict[str, int]  # rows and documents that are not in it, by reason
    silent_tokens: int  # of rows with nothing supervised
    unreadable: frozenset[str]  # files


@dataclass(frozen=True)
class Spec:
    """How a window is packed; goes to the worker processes."""

    data: Data
    held_out_below: int
    seed: int


@dataclass
class _Documents:
    """Documents of a window, to be cut."""

    documents: list[Document] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)  # no two are the same
    places: list[str] = dataclasses.field(default_factory=list)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.array([len(document) for document in self.documents], dtype=np.int32)

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        return np.array([document.supervised for document in self.documents], dtype=np.int32)

    def document(self, i: int) -> Document:
        return self.documents[i]

    def where(self, i: int) -> str:
        return self.places[i]


def make_window(recipe: Recipe, spec: Spec, items: Sequence[Item], place: Position) -> Window:
    """Read, tokenise, choose, cut and pack the documents of one window.

    Raises:
        DataError: a row cannot be used, or a file not be read, and that is an error.
    """
    documents, lost, silent_tokens, unreadable = _Documents(), Counter[str](), 0, set()
    for item in items:
        try:
            for chunk in item.chunks():
                silent_tokens += _add(documents, lost, recipe, spec, chunk)
        except UnreadableFile:
            if spec.data.on_bad_row == "error":
                raise
            unreadable.add(item.block.file.path)
    rows, dropped = _packed(documents, spec, place)
    lost.update(dropped)
    return Window(rows, dict(lost), silent_tokens, frozenset(unreadable))


def _add(documents: _Documents, lost: Counter[str], recipe: Recipe, spec: Spec, chunk: Chunk) -> int:
    """Add the documents of a chunk, count what is lost, and return the tokens of rows with nothing supervised."""
    collected = collect(recipe, chunk)
    if collected.bad and spec.data.on_bad_row == "error":
        row, _, told = collected.bad[0]
        raise bad_row_error(chunk.file.path, row, told)
    verdict = choose_collected(collected, recipe, spec.held_out_below)
    lost.update(reason for _, reason, _ in collected.bad)
    lost.update({**verdict.counts(), "held out": int(verdict.held.sum())})
    for i in np.flatnonzero(verdict.kept).tolist():
        owner = collected.owners[i]
        where = collected.conversations[owner].where
        documents.documents.append(collected.documents[i])
        documents.names.append(f"{where} {owner} {collected.parts[i]}")
        documents.places.append(where)
    return verdict.silent_tokens


def _packed(documents: _Documents, spec: Spec, place: Position) -> tuple[list[Row], dict[str, int]]:
    """Rows of the documents cut to length, in the window's own random order; and what was dropped, by reason."""
    pieces = cut(documents, spec.data)
    random = np.random.SeedSequence([spec.seed, place.epoch, place.shard, place.window]).generate_state(1)[0]
    plan = plan_rows(pieces.length, spec.data.sequence_length, int(random), 0)
    rows = []
    for r in range(plan.rows):
        row: list[tuple[int, Document, str]] = []
        for i in plan.row(r).tolist():
            of, start, length = int(pieces.document[i]), int(pieces.start[i]), int(pieces.length[i])
            number = hash64(f"{documents.names[of]} {start}") >> 1
            row.append((number, documents.documents[of].piece(start, length), documents.places[of]))
        rows.append(Row(*zip(*row, strict=True)))
    return rows, dict(pieces.dropped)
