"""Rows read, tokenised and packed while training, in bounded memory, from data of any size.

    files ──▶ blocks ──shuffle──▶ virtual shards ──▶ windows of blocks ──worker──▶ packed rows

An epoch deals the blocks of all files to the shards in an order of its own. Shards are read one after the other, and
within a shard window after window: the blocks of a window are tokenised together and packed together, and no
document is in two windows. All of it follows from the seed and the files; ranks and worker processes have no part in
it. A position is four numbers; going on from it makes one window again.

Plain JSONL, Parquet and Arrow files are cut into blocks that are read from anywhere. A file that can only be read
from its start (compressed, CSV, a JSON array), or a very large row group, is one block: it stays in one shard, and its
rows come in their order, mixed with those of a few other blocks.
"""

import dataclasses
import itertools
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack

import numpy as np
from tokenizers import Tokenizer

from bigtune.config import Data
from bigtune.data.files import Block, list_blocks, read_block
from bigtune.data.holdout import bound
from bigtune.data.inputs import stream_fingerprint
from bigtune.data.pool import open_pool, result_of
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Position, Row
from bigtune.data.sources import UNREADABLE, SourceFile, UnreadableFile, resolve_sources, stat_of
from bigtune.data.window import Item, Spec, Window, make_window
from bigtune.dist import World
from bigtune.errors import DataError, counted

BLOCK_BYTES = 2**18
WINDOW_BYTES = 2**21
"""Raw bytes of a window at least; long rows take more, so that some hundreds are packed together."""
ROWS_A_WINDOW, BYTES_A_TOKEN = 256, 4
SHARDS, WINDOWS_A_SHARD = 64, 4
"""So many shards at most, of so many windows at least."""
OPEN_FILES = 4
"""Large blocks that a shard reads at the same time."""
MOST_WORKERS = 4
"""Processes of a rank, where the run file does not say."""
EMPTY_AT_FIRST = 64
"""Windows without a row that end a run at its start: not all of a large source is read to find that it has none."""
LARGE = 4
"""A block of so many times its due size is read by the rank, chunk by chunk, instead of by one worker at once."""
MOST_BLOCKS = 2**18
"""Of blocks that a rank keeps a list of."""


class NothingToTrainOn(DataError):
    """No document of a stream has anything to learn."""


class LiveRows:
    """The rows of raw sources, epoch after epoch without end. `close` ends its worker processes."""

    def __init__(self, data: Data, recipe: Recipe, seed: int) -> None:
        """Raises DataError if a source cannot be read."""
        self._data, self._recipe = data, recipe
        self._spec = Spec(data, bound(data.holdout), seed)
        self.lost: Counter[str] = Counter()
        self._unreadable: set[str] = set()
        self._stats: dict[SourceFile, list[int] | None] = {}
        self._blocks: list[Block] = []  # that are handed to a worker as they are
        self._large: list[Block] = []  # that are read here, chunk by chunk
        files, _ = resolve_sources(data.sources)
        self._list_blocks(files)
        self._window_bytes = max(WINDOW_BYTES, ROWS_A_WINDOW * BYTES_A_TOKEN * data.sequence_length)
        self._bytes = sum(block.size for block in [*self._blocks, *self._large])
        self.shards = max(1, min(SHARDS, self._bytes // self._window_bytes // WINDOWS_A_SHARD))
        cutting = [BLOCK_BYTES, LARGE, MOST_BLOCKS, self._window_bytes, SHARDS, WINDOWS_A_SHARD, OPEN_FILES]
        self.fingerprint = stream_fingerprint(list(self._stats), data, recipe, cutting)
        self._resources = ExitStack()
        workers = data.workers or _spare_cores()
        self._ahead = workers + 1
        self._pool = self._resources.enter_context(open_pool(workers, recipe))
        self._after = Position(-1)  # where the last `take` ended; the first one begins
        self._window = Window([], {}, 0, frozenset())

    def _list_blocks(self, files: Sequence[SourceFile]) -> None:
        for file in files:
            try:
                self._stats[file] = stat_of(file)
            except UnreadableFile as error:
                self._skip(file, error)
        sizes = [stat[0] for stat in self._stats.values() if stat]
        block_bytes = max(BLOCK_BYTES, sum(sizes) // MOST_BLOCKS)
        for file in list(self._stats):
            try:
                for block in list_blocks(file, block_bytes):
                    (self._large if block.whole or block.size > LARGE * block_bytes else self._blocks).append(block)
            except UnreadableFile as error:
                self._skip(file, error)
                del self._stats[file]

    def _skip(self, file: SourceFile, error: UnreadableFile) -> None:
        if self._data.on_bad_row == "error":
            raise error
        self._unreadable.add(file.path)

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

    def where(self, row: Row) -> tuple[str, ...]:
        return row.places

    def epochs_at(self, position: Position) -> float:
        """How many epochs were read before a position, about: what is compressed has an unknown number of windows."""
        windows = max(1.0, self._bytes / self.shards / self._window_bytes)
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

    def first_window(self) -> Window:
        """The first window that has rows.

        Raises:
            DataError: as `take`; or none of many windows, or of an epoch, has any.
        """
        self._begin(Position())
        return self._window

    def require_supervised(self, window: Window) -> None:
        """Refuse sources of whose first window next to nothing is supervised.

        Raises:
            DataError: its share of supervised tokens is below `data.min_supervised`.
        """
        tokens = sum(row.tokens for row in window.rows) + window.silent_tokens
        share = sum(row.supervised for row in window.rows) / max(1, tokens)
        if share < self._data.min_supervised:
            raise DataError(
                f"data.sources: only {share:.3%} of the first tokens are supervised, less than data.min_supervised "
                f"({self._data.min_supervised:.3%}); see `bigtune inspect`, or lower it if that is meant"
            )

    def describe(self) -> str:
        return f"rows of {self._data.sequence_length:,} tokens, streamed from {len(self._stats):,} files"

    def losses(self) -> str:
        return counted({**self.lost, UNREADABLE: len(self._unreadable)})

    def _begin(self, position: Position) -> None:
        """Make the window of a position again; where it is none any more, the next one follows."""
        self._windows = self._made_windows(position)
        self._open_next()
        if self._after == dataclasses.replace(position, row=0):
            if position.row > len(self._window.rows):
                raise DataError(
                    f"no row {position.row} in a window of {len(self._window.rows)}; the data is other data"
                )
            self._after = position

    def _open_next(self) -> None:
        self._after, self._window = next(self._windows)
        self._count(self._window)

    def _count(self, window: Window) -> None:
        self.lost.update(window.lost)
        self._unreadable |= window.unreadable

    def _made_windows(self, start: Position) -> Iterator[tuple[Position, Window]]:
        """Windows from `start` on, made ahead by the pool; those without a row are left out."""
        waiting: deque[tuple[Position, Future[Window]]] = deque()
        found = start != Position(start.epoch)  # rows of this epoch; in its middle one cannot know
        empty, patience = 0, float(EMPTY_AT_FIRST)
        for place, items in self._window_items(start):
            waiting.append((place, self._pool.submit(make_window, self._spec, items, place)))
            if len(waiting) <= self._ahead:
                continue
            place, future = waiting.popleft()
            window = result_of(future)
            if window.rows:
                found, patience = True, math.inf
                yield place, window
                continue
            self._count(window)
            ended = place.shard == self.shards
            empty += not ended
            if empty >= patience or (ended and not found):
                where = f"the first {empty} windows" if empty >= patience else "a whole epoch"
                why = self.losses() or "the files are empty"
                raise NothingToTrainOn(f"data.sources: nothing to train on in {where} ({why}); mend the rows or data")
            found = found and not ended

    def _window_items(self, start: Position) -> Iterator[tuple[Position, list[Item]]]:
        """What each window from `start` on is made of. Windows before it cost reading only what is read here."""
        for epoch in itertools.count(start.epoch):
            first_shard = start.shard if epoch == start.epoch else 0
            for shard in range(first_shard, self.shards):
                skip = start.window if (epoch, shard) == (start.epoch, start.shard) else 0
                windows = self._filled(self._shard_items(epoch, shard))
                for window, items in enumerate(windows):
                    if window >= skip:
                        yield Position(epoch, 0, shard, window), items
            yield Position(epoch, 0, self.shards), []  # so that an epoch without rows is seen to end

    def _filled(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        """Windows' worth of items."""
        window: list[Item] = []
        size = 0
        for item in items:
            window.append(item)
            size += item.size
            if size >= self._window_bytes:
                yield window
                window, size = [], 0
        if window:
            yield window

    def _shard_items(self, epoch: int, shard: int) -> Iterator[Item]:
        """The blocks of a shard in the epoch's order, in turn with the chunks of its large ones."""
        random = np.random.default_rng([self._spec.seed, epoch])
        blocks = [self._blocks[i] for i in random.permutation(len(self._blocks))[shard :: self.shards]]
        large = [self._large[i] for i in random.permutation(len(self._large))[shard :: self.shards]]
        lanes: list[Iterator[Item]] = [(Item(block) for block in blocks)]
        lanes += [self._chunks(large[i::OPEN_FILES]) for i in range(min(OPEN_FILES, len(large)))]
        while lanes:
            for lane in list(lanes):
                item = next(lane, None)
                if item is None:
                    lanes.remove(lane)
                    continue
                file = item.block.file
                if stat_of(file) != self._stats[file]:
                    raise DataError(f"{file.path}: changed since the run started; start it again, with --new-data")
                yield item

    def _chunks(self, blocks: Sequence[Block]) -> Iterator[Item]:
        for block in blocks:
            try:
                yield from (Item(block, chunk) for chunk in read_block(block, BLOCK_BYTES))
            except UnreadableFile as error:
                self._skip(block.file, error)


def _spare_cores() -> int:
    """Processes for a rank: every one of them tokenises the whole stream."""
    cores = len(os.sched_getaffinity(0)) // World.from_environment().local_size
    return min(max(1, cores - 1), MOST_WORKERS)
