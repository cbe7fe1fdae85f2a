"""Raw files → document store: in parallel, bounded in memory, and never the same work twice.

    sources ──chunks──▶ worker processes ──▶ parts ──choose──▶ manifest
                                              ▲ made already? then left as they are

A part is named by the contents of its file, the tokenizer, the template and the options. So a call that was
killed goes on where it ended, a new file costs its own work alone, and the same inputs give the same bytes
whatever the number of processes. To find a store current takes hashing files, or their sizes and times only.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from filelock import FileLock

from bigtune.config import Data, Source
from bigtune.data.account import Made, manifest_of, require_fields, require_supervised, rows_left_out
from bigtune.data.choose import choose
from bigtune.data.files import read_chunks
from bigtune.data.formats import bad_row_error
from bigtune.data.inputs import Inputs, inputs_of, part_key
from bigtune.data.manifest import Manifest, PartCounts, read_manifest
from bigtune.data.parts import make_part
from bigtune.data.pool import Pool, open_pool, result_of
from bigtune.data.recipe import Recipe
from bigtune.data.sources import UnreadableFile
from bigtune.data.store import (
    PARTS,
    Columns,
    is_whole,
    read_part_counts,
    refuse_foreign,
    write_store,
    writing,
)
from bigtune.errors import DataError

SMALL_BYTES = 2**20
"""Sources that are smaller together are tokenised in this process, before another one would have started."""

Progress = Callable[[int, int | None], None]


def prepare(
    data: Data,
    model_path: Path,
    store_path: Path,
    progress: Progress | None = None,
    keep: str | None = None,
    held_out: Sequence[Source] = (),
    check: bool = True,
) -> Manifest:
    """Make the store at `store_path` hold the documents of `data`. `progress` gets (rows read, None).

    Args:
        keep: the fingerprint of documents that a checkpoint goes on with; a store of them is not replaced.
        held_out: sources of held-out rows, which `data.clean.decontaminate` compares with.
        check: refuse documents of which next to nothing is supervised; their store is made all the same.

    Raises:
        DataError: a source cannot be read, a row cannot be used, next to nothing is left to train on, or the
            store to keep is of other sources.
        ModelError: the model folder or its tokenizer is missing or broken.
    """
    manifest = _prepared(data, model_path, store_path, progress, keep, held_out)
    if check:
        require_supervised(manifest, data)
    return manifest


def is_prepared(data: Data, model_path: Path, store_path: Path, held_out: Sequence[Source] = ()) -> bool:
    """Whether the store at `store_path` holds the documents of `data`. Nothing is written.

    Raises:
        ModelError: the model folder is missing.
        DataError: a source cannot be read.
    """
    before = _manifest_or_none(store_path)
    return before is not None and _is_current(store_path, before, data, inputs_of(data, model_path, held_out, before))


def _prepared(
    data: Data,
    model_path: Path,
    store_path: Path,
    progress: Progress | None,
    keep: str | None,
    held_out: Sequence[Source],
) -> Manifest:
    before = _manifest_or_none(store_path)
    inputs = inputs_of(data, model_path, held_out, before)
    if before is not None and _is_current(store_path, before, data, inputs):
        return before  # before the lock, so that ranks need not queue
    with writing(store_path):
        store_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store_path.parent / f"{store_path.name}.lock")
        lock.acquire()
    try:
        before = _manifest_or_none(store_path)
        if before is not None and _is_current(store_path, before, data, inputs):
            return before
        _refuse_to_replace(store_path, before, inputs, keep)
        return _make(data, inputs, model_path, store_path, progress, held_out)
    finally:
        lock.release()


def _is_current(store_path: Path, manifest: Manifest, data: Data, inputs: Inputs) -> bool:
    """Whether there is nothing to do: not so where files of the store are lost, or rows that were skipped no longer
    may be."""
    refused = data.on_bad_row == "error" and manifest.skipped
    return manifest.fingerprint == inputs.fingerprint and not refused and is_whole(store_path, manifest)


def _make(
    data: Data,
    inputs: Inputs,
    model_path: Path,
    store_path: Path,
    progress: Progress | None,
    held_out: Sequence[Source],
) -> Manifest:
    refuse_foreign(store_path)
    with writing(store_path):
        (store_path / PARTS).mkdir(parents=True, exist_ok=True)
    made = [Made(file) for file in inputs.files]
    rows = 0
    small = sum(file.bytes for file in inputs.files) < SMALL_BYTES
    workers = 0 if small else data.workers or len(os.sched_getaffinity(0))
    with open_pool(workers, partial(Recipe.of, data, model_path, held_out)) as pool:
        chat = pool.recipe.chat
        for of, name, counts in _make_parts(data, inputs, pool, 2 * max(1, workers), store_path / PARTS, made):
            if counts.bad and data.on_bad_row == "error":
                row, _, told = counts.bad[0]
                raise bad_row_error(of.file.file.path, row, told)
            of.parts[name] = counts
            rows += counts.rows
            if progress is not None:
                progress(rows, None)
    require_fields(made, data.sources)
    columns = Columns([store_path / PARTS / f"{name}.arrow" for of in made for name in of.parts])
    choice = choose(columns, data.clean, data.holdout)
    manifest = manifest_of(data, inputs, chat, made, columns, choice)
    write_store(store_path, manifest, choice.chosen, rows_left_out(made, columns, choice))
    return manifest


def _make_parts(
    data: Data, inputs: Inputs, pool: Pool, most_waiting: int, folder: Path, made: Sequence[Made]
) -> Iterator[tuple[Made, str, PartCounts]]:
    """Parts in their order; those that are not there yet are made by the pool."""
    waiting: deque[tuple[Made, str, PartCounts | Future[PartCounts]]] = deque()

    def next_done() -> tuple[Made, str, PartCounts]:
        of, name, counts = waiting.popleft()
        return of, name, counts if isinstance(counts, PartCounts) else result_of(counts)

    for of in made:
        key = part_key(of.file, data, inputs.recipe)
        try:
            for chunk in read_chunks(of.file.file, of.file.chunk_bytes):
                of.file.refuse_changed()  # before there is a part that bears the name of what was hashed
                name = f"{key}-{chunk.index:05d}"
                counts = read_part_counts(folder / name)
                waiting.append((of, name, counts or pool.submit(make_part, chunk, folder / name)))
                while len(waiting) > most_waiting:
                    yield next_done()
        except UnreadableFile as error:
            if data.on_bad_row == "error":
                raise
            of.unreadable = str(error)
    while waiting:
        yield next_done()


def _refuse_to_replace(store_path: Path, before: Manifest | None, inputs: Inputs, keep: str | None) -> None:
    if before is not None and before.fingerprint == keep != inputs.fingerprint:
        raise DataError(
            f"{store_path}: a source or the tokenizer changed since this run was started; change it back to go on "
            "with the run, start a new one with another output, or go on with --new-data from the next epoch on"
        )


def _manifest_or_none(store_path: Path) -> Manifest | None:
    try:
        return read_manifest(store_path)
    except DataError:
        return None
