"""Rows read, tokenised and packed while training, in bounded memory, from data of any size.

    files ──▶ blocks ──shuffle──▶ virtual shards ──▶ windows of blocks ──worker──▶ packed rows

An epoch deals the blocks of all files to the shards in an order of its own. Shards are read one after the other, and
within a shard window after window: the blocks of a window are tokenised together and packed together, and no
document is in two windows. All of it follows from the seed and the files; ranks and worker processes have no part in
it. A position is four numbers; going on from it makes one window again.

Plain JSONL, Parquet and Arrow files are cut into blocks that are read from anywhere. A file that can only be read
from its start (compressed, CSV, a JSON array) stays in one shard, and its chunks come in their order.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from bigtune.config import Data
from bigtune.data.choose import choose_collected
from bigtune.data.files import Block, Chunk, list_blocks, read_block, read_chunks
from bigtune.data.holdout import bound
from bigtune.data.parts import collect
from bigtune.data.pieces import cut
from bigtune.data.plan import plan_rows
from bigtune.data.pool import open_pool, result_of
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Position, Row
from bigtune.data.sources import SourceFile, UnreadableFile, hash_of, resolve_sources, stat_of
from bigtune.data.store import Document
from bigtune.errors import DataError

BLOCK_BYTES = 2**18
WINDOW_BYTES = 2**21
"""Raw bytes of a window at least; long rows take more, so that some hundreds are packed together."""
ROWS_A_WINDOW, BYTES_A_TOKEN = 256, 4
SHARDS, WINDOWS_A_SHARD = 64, 4
"""So many shards at most, of so many windows at least."""
OPEN_FILES = 4
"""Files that a shard reads from their start at the same time."""
AHEAD = 2
"""Windows made ahead of the one that is read."""
EMPTY_AT_FIRST = 64
"""Windows without a row that end a run at its start: not all of a large source is read to find that it has none."""
SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class Window:
    """What the blocks of one window became."""

    rows: list[Row]
    lost: dict[str, int]  # rows and documents that are not in it, by reason


@dataclass(frozen=True)
class Spec:
    """How a window is packed; goes to the worker processes."""

    data: Data
    held_out_below: int
    seed: int


class LiveRows:
    """The rows of raw sources, epoch after epoch without end. `close` ends its worker processes."""

    def __init__(self, data: Data, recipe: Recipe, seed: int) -> None:
        """Raises DataError if a source cannot be read."""
        self._data, self._recipe = data, recipe
        self._spec = Spec(data, bound(data.holdout, np.empty(0, np.uint64)), seed)
        self._files, _ = resolve_sources(data.sources)
        self._stats = {file: stat_of(file) for file in self._files}
        self._sequential: list[SourceFile] = []
        self._blocks: list[Block] = []
        for file in self._files:
            blocks = list_blocks(file, BLOCK_BYTES)
            if blocks is None:
                self._sequential.append(file)
            else:
                self._blocks += blocks
        window_bytes = max(WINDOW_BYTES, ROWS_A_WINDOW * BYTES_A_TOKEN * data.sequence_length)
        self._blocks_a_window = -(-window_bytes // BLOCK_BYTES)
        windows = len(self._blocks) // self._blocks_a_window + len(self._sequential)
        self.shards = max(1, min(SHARDS, windows // WINDOWS_A_SHARD))
        self.fingerprint = _identify(self._files, data, recipe)
        self.lost: Counter[str] = Counter()
        self._resources = ExitStack()
        self._pool = self._resources.enter_context(open_pool(data.workers or 1, recipe))
        self._after = Position(-1)  # where the last `take` ended; the first one begins
        self._window = Window([], {})

    def close(self) -> None:
        self._resources.close()

    def take(self, position: Position, count: int) -> tuple[list[Row], Position]:
        """The next `count` rows from `position` on, and the position after them.

        Raises:
            DataError: a row cannot be used, a file changed, or an epoch has no document.
        """
        if position != self._after:
            self._begin(position)
        rows: list[Row] = []
        while len(rows) < count:
            if self._after.row >= len(self._window.rows):
                self._open_next()
            end = min(self._after.row + count - len(rows), len(self._window.rows))
            rows += self._window.rows[self._after.row : end]
            self._after = dataclasses.replace(self._after, row=end)
        return rows, self._after

    def epochs_at(self, position: Position) -> float:
        """How many epochs were read before a position, about: files without blocks have unknown numbers of windows."""
        windows = max(1.0, len(self._blocks) / self.shards / self._blocks_a_window)
        return position.epoch + (position.shard + min(1.0, position.window / windows)) / self.shards

    @property
    def documents(self) -> str:
        return self.fingerprint

    @property
    def chat_template(self) -> str | None:
        chat = self._recipe.chat
        return None if chat.name == "model" else chat.template

    @property
    def highest_token(self) -> int:
        return max(Tokenizer.from_str(self._recipe.chat.tokenizer_json).get_vocab().values())

    def longest(self) -> tuple[int, str]:
        return self._data.sequence_length, "data.stream"

    def require_supervised(self) -> None:
        """Refuse sources whose first window has nothing, or next to nothing, to learn.

        Raises:
            DataError: its share of supervised tokens is below `data.min_supervised`.
        """
        self._begin(Position())
        rows = self._window.rows
        share = sum(row.supervised for row in rows) / max(1, sum(row.tokens for row in rows))
        if share < self._data.min_supervised:
            raise DataError(
                f"data.sources: only {share:.3%} of the first tokens are supervised, less than data.min_supervised "
                f"({self._data.min_supervised:.3%}); see `bigtune inspect`, or lower it if that is meant"
            )

    def describe(self) -> str:
        return f"rows of {self._data.sequence_length:,} tokens, streamed from {len(self._files):,} files"

    def losses(self) -> str:
        return "; ".join(f"{count:,} × {reason}" for reason, count in self.lost.items() if count)

    def _begin(self, position: Position) -> None:
        """Make the window of a position again; where it is none any more, the next one follows."""
        self._windows = self._made_windows(position)
        self._open_next()
        if self._after == dataclasses.replace(position, row=0):
            self._after = position

    def _open_next(self) -> None:
        self._after, self._window = next(self._windows)
        self.lost.update(self._window.lost)

    def _made_windows(self, start: Position) -> Iterator[tuple[Position, Window]]:
        """Windows from `start` on, made ahead by the pool; those without a row are left out."""
        waiting: deque[tuple[Position, Future[Window]]] = deque()
        empty_since, empty, patience = start.epoch, 0, EMPTY_AT_FIRST
        for place, items in self._window_items(start):
            waiting.append((place, self._pool.submit(make_window, self._spec, items, place)))
            if len(waiting) <= AHEAD:
                continue
            place, future = waiting.popleft()
            window = result_of(future)
            if window.rows:
                empty_since, patience = place.epoch, math.inf
                yield place, window
                continue
            self.lost.update(window.lost)
            empty += 1
            if place.epoch > empty_since + 1 or empty >= patience:
                where = "a whole epoch" if place.epoch > empty_since + 1 else f"the first {empty} windows"
                why = self.losses() or "the files are empty"
                raise DataError(f"data.sources: nothing to train on in {where} ({why}); mend the rows or data")

    def _window_items(self, start: Position) -> Iterator[tuple[Position, list[Block | Chunk]]]:
        """What each window from `start` on is made of. Windows before it cost reading only what has no blocks."""
        for epoch in itertools.count(start.epoch):
            first_shard = start.shard if epoch == start.epoch else 0
            for shard in range(first_shard, self.shards):
                skip = start.window if (epoch, shard) == (start.epoch, start.shard) else 0
                items = self._shard_items(epoch, shard)
                for window in itertools.count():
                    some = list(itertools.islice(items, self._blocks_a_window))
                    if not some and (window or shard < self.shards - 1):
                        break
                    if window >= skip:
                        yield Position(epoch, 0, shard, window), some
                    if not some:
                        break

    def _shard_items(self, epoch: int, shard: int) -> Iterator[Block | Chunk]:
        """The blocks of a shard in the epoch's order, in turn with the chunks of files that have none."""
        random = np.random.default_rng([self._spec.seed, epoch])
        blocks = [self._blocks[i] for i in random.permutation(len(self._blocks))[shard :: self.shards]]
        files = [self._sequential[i] for i in random.permutation(len(self._sequential))[shard :: self.shards]]
        lanes: list[Iterator[Block | Chunk]] = [iter(blocks)]
        lanes += [self._chunks(files[i::OPEN_FILES]) for i in range(min(OPEN_FILES, len(files)))]
        while lanes:
            for lane in list(lanes):
                item = next(lane, None)
                if item is None:
                    lanes.remove(lane)
                    continue
                if stat_of(item.file) != self._stats[item.file]:
                    raise DataError(f"{item.file.path}: changed since the run started; start it again, with --new-data")
                yield item

    def _chunks(self, files: Sequence[SourceFile]) -> Iterator[Chunk]:
        for file in files:
            try:
                yield from read_chunks(file, BLOCK_BYTES)
            except UnreadableFile:
                if self._data.on_bad_row == "error":
                    raise
                self.lost["unreadable file"] += 1


def make_window(recipe: Recipe, spec: Spec, items: Sequence[Block | Chunk], place: Position) -> Window:
    """Read, tokenise, choose, cut and pack the documents of one window.

    Raises:
        DataError: a row cannot be used and that is an error.
    """
    documents: list[Document] = []
    names: list[str] = []
    lost: Counter[str] = Counter()
    for item in items:
        chunk = _read(item)
        collected = collect(recipe, chunk)
        if collected.bad and spec.data.on_bad_row == "error":
            row, _, told = collected.bad[0]
            raise DataError(f"{chunk.file.path}, row {row}: {told}; mend the row, or set data.on_bad_row: skip")
        lost.update(reason for _, reason, _ in collected.bad)
        kept = choose_collected(collected, recipe, spec.held_out_below, lost)
        for i in np.flatnonzero(kept):
            documents.append(Document(*dataclasses.astuple(collected.documents[i])))
            conversation = collected.conversations[collected.owners[i]]
            names.append(f"{conversation.where} {collected.parts[i]}")
    whole = _Documents(documents, names)
    pieces = cut(whole, spec.data)
    lost.update(pieces.dropped)
    random = np.random.SeedSequence([spec.seed, place.epoch, place.shard, place.window]).generate_state(1)[0]
    plan = plan_rows(pieces.length, spec.data.sequence_length, int(random), 0)
    rows = []
    for r in range(plan.rows):
        chosen = plan.row(r).tolist()
        parts = [(names[pieces.document[i]], int(pieces.start[i]), int(pieces.length[i])) for i in chosen]
        cuts = tuple(
            documents[pieces.document[i]].piece(start, length)
            for i, (_, start, length) in zip(chosen, parts, strict=True)
        )
        numbers = tuple(_number(f"{name} {start}") for name, start, _ in parts)
        rows.append(Row(numbers, cuts, tuple(whole.where(pieces.document[i]) for i in chosen)))
    return Window(rows, dict(lost))


@dataclass(frozen=True)
class _Documents:
    """Documents of a window, to be cut."""

    documents: Sequence[Document]
    names: Sequence[str]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.array([len(document.input_ids) for document in self.documents], dtype=np.int32)

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        return np.array([int(np.diff(document.spans).sum()) for document in self.documents], dtype=np.int32)

    def document(self, i: int) -> Document:
        return self.documents[i]

    def where(self, i: int) -> str:
        return self.names[i].rsplit(" ", 1)[0]


def _read(item: Block | Chunk) -> Chunk:
    if isinstance(item, Chunk):
        return item
    chunk = read_block(item)
    # Rows of a block are counted from its start, which the file's name then tells of.
    place = f"{item.file.path} (from {'byte' if item.file.kind == 'jsonl' else 'block'} {item.start:,} on)"
    return dataclasses.replace(chunk, file=dataclasses.replace(item.file, path=place))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def _identify(files: Sequence[SourceFile], data: Data, recipe: Recipe) -> str:
    """A hash of the sources' sizes, beginnings and ends, and of what rows become: data of any size in no time."""
    settings = data.model_dump(mode="json", include={"sequence_length", "on_long_document", "clean", "holdout"})
    overlap = recipe.overlap.identity if recipe.overlap else None
    tokenizer = hashlib.sha256(recipe.chat.tokenizer_json.encode()).hexdigest()
    facts: list[Any] = [settings, recipe.chat.identity, tokenizer, overlap]
    for file in files:
        facts.append([file.source, *_sample(file)])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sample(file: SourceFile) -> list[Any]:
    stat = stat_of(file)
    if stat is None:
        return [hash_of(file)]
    with Path(file.path).open("rb") as opened:
        ends = [opened.read(SAMPLE_BYTES)]
        opened.seek(max(0, stat[0] - SAMPLE_BYTES))
        ends.append(opened.read(SAMPLE_BYTES))
    return [stat[0], *(hashlib.sha256(end).hexdigest() for end in ends)]
