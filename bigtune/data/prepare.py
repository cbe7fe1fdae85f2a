"""Raw files → document store: in parallel, bounded in memory, and never the same work twice.

    sources ──chunks──▶ worker processes ──▶ parts ──choose──▶ manifest
                                              ▲ made already? then left as they are

A part is named by the contents of its file, the tokenizer, the template and the options. So a call that was
killed goes on where it ended, a new file costs its own work alone, and the same inputs give the same bytes
whatever the number of processes. To find a store current takes hashing files, or their sizes and times only.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bigtune.config import Data, Source
from bigtune.data.chat import ChatFormat
from bigtune.data.choose import Choice, choose
from bigtune.data.files import read_chunks
from bigtune.data.inputs import InputFile, Inputs, inputs_of, part_key
from bigtune.data.parts import make_part
from bigtune.data.pool import Pool, open_pool, result_of
from bigtune.data.recipe import Recipe
from bigtune.data.sources import UNREADABLE, UnreadableFile
from bigtune.data.store import (
    PARTS,
    Columns,
    Manifest,
    PartCounts,
    SourceCounts,
    read_manifest,
    read_part_counts,
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
    if before is not None and before.fingerprint == inputs.fingerprint:
        return before  # before the lock, so that ranks need not queue
    with writing(store_path):
        store_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store_path.parent / f"{store_path.name}.lock")
        lock.acquire()
    try:
        before = _manifest_or_none(store_path)
        if before is not None and before.fingerprint == inputs.fingerprint:
            return before
        _refuse_to_replace(store_path, before, keep)
        return _make(data, inputs, model_path, store_path, progress, held_out)
    finally:
        lock.release()


def _make(
    data: Data,
    inputs: Inputs,
    model_path: Path,
    store_path: Path,
    progress: Progress | None,
    held_out: Sequence[Source],
) -> Manifest:
    with writing(store_path):
        (store_path / PARTS).mkdir(parents=True, exist_ok=True)
    made = [_Made(file) for file in inputs.files]
    rows = 0
    small = sum(file.bytes for file in inputs.files) < SMALL_BYTES
    workers = 0 if small else data.workers or len(os.sched_getaffinity(0))
    with open_pool(workers, partial(Recipe.of, data, model_path, held_out)) as pool:
        chat = pool.recipe.chat
        for of, name, counts in _make_parts(data, inputs, pool, 2 * max(1, workers), store_path / PARTS, made):
            if counts.bad and data.on_bad_row == "error":
                row, _, told = counts.bad[0]
                raise DataError(f"{of.file.file.path}, row {row}: {told}; mend the row, or set data.on_bad_row: skip")
            of.parts[name] = counts
            rows += counts.rows
            if progress is not None:
                progress(rows, None)
    columns = Columns([store_path / PARTS / f"{name}.arrow" for of in made for name in of.parts])
    choice = choose(columns, data.clean, data.holdout)
    manifest = _manifest(data, inputs, chat, made, columns, choice)
    write_store(store_path, manifest, choice.chosen, _removed(made, columns, choice))
    return manifest


@dataclass
class _Made:
    """What became of one file: its parts in their order, and why it could not be read to its end, if so."""

    file: InputFile
    parts: dict[str, PartCounts] = field(default_factory=dict)
    unreadable: str = ""


def _make_parts(
    data: Data, inputs: Inputs, pool: Pool, most_waiting: int, folder: Path, made: Sequence[_Made]
) -> Iterator[tuple[_Made, str, PartCounts]]:
    """Parts in their order; those that are not there yet are made by the pool."""
    waiting: deque[tuple[_Made, str, PartCounts | Future[PartCounts]]] = deque()

    def next_done() -> tuple[_Made, str, PartCounts]:
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


def _manifest(
    data: Data, inputs: Inputs, chat: ChatFormat, made: Sequence[_Made], columns: Columns, choice: Choice
) -> Manifest:
    parts = [counts for of in made for counts in of.parts.values()]
    skipped = Counter(reason for counts in parts for _, reason, _ in counts.bad)
    skipped[UNREADABLE] += sum(bool(of.unreadable) for of in made)
    lengths, supervised = columns.lengths()[choice.chosen], columns.numbers("supervised")[choice.chosen]
    source_of_part = np.array([of.file.file.source for of in made for _ in of.parts], dtype=np.int64)
    source = source_of_part[columns.parts_of(choice.chosen)]
    return Manifest(
        fingerprint=inputs.fingerprint,
        files=[
            {"source": of.file.file.source, "path": of.file.file.path, "hash": of.file.hash,
             "stat": of.file.lasting_stat, "parts": list(of.parts)}
            for of in made
        ],
        sources=[
            SourceCounts(
                name=named.name,
                rows=sum(c.rows for of in made if of.file.file.source == i for c in of.parts.values()),
                documents=int((source == i).sum()),
                tokens=int(lengths[source == i].sum(dtype=np.int64)),
                supervised_tokens=int(supervised[source == i].sum(dtype=np.int64)),
            )
            for i, named in enumerate(data.sources)
        ],
        rows=sum(counts.rows for counts in parts),
        documents=len(choice.chosen),
        conversations=sum(counts.conversations for counts in parts),
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        longest_tokens=int(lengths.max(initial=0)),
        highest_token=max((counts.highest_token for counts in parts), default=0),
        template=chat.name,
        template_text=chat.template,
        skipped={reason: count for reason, count in skipped.items() if count},
        removed=dict(choice.counts),
        held_out=choice.held_out,
        held_out_below=choice.held_out_below,
        holdout=data.holdout,
        split_rows=sum(counts.split_rows for counts in parts),
        duplicate_ids=choice.duplicate_ids,
        ignored_files=list(inputs.ignored),
    )  # fmt: skip


def _removed(made: Sequence[_Made], columns: Columns, choice: Choice) -> Iterator[dict[str, Any]]:
    """A line for each row that is not trained on: where it is, why, and what row it repeats."""
    paths = [of.file.file.path for of in made for _ in of.parts]

    def where(position: int) -> dict[str, Any]:
        return {"file": paths[columns.place(position)[0]], "row": columns.row(position)}

    for of in made:
        for counts in of.parts.values():
            for row, reason, told in counts.bad:
                yield {"file": of.file.file.path, "row": row, "reason": reason, "told": told}
        if of.unreadable:
            yield {"file": of.file.file.path, "reason": UNREADABLE, "told": of.unreadable}
    for position, reason, like in choice.removed:
        yield {**where(position), "reason": reason, **({} if like is None else {"like": where(like)})}


def require_supervised(manifest: Manifest, data: Data) -> None:
    """Refuse a run that has nothing, or next to nothing, to learn.

    Raises:
        DataError: the share of supervised tokens is below `data.min_supervised`; the message says what was lost.
    """
    share = manifest.supervised_tokens / max(manifest.tokens, 1)
    if manifest.supervised_tokens and share >= data.min_supervised:
        return
    losses = {**manifest.skipped, **manifest.removed}
    if manifest.held_out:
        losses["held out"] = manifest.held_out
    why = "; ".join(f"{count:,} × {reason}" for reason, count in losses.items()) or "the files are empty"
    names = ", ".join(source.name for source in data.sources)
    if not manifest.supervised_tokens:
        raise DataError(
            f"{names}: nothing to train on is left of {manifest.rows:,} rows ({why}); mend the rows or data"
        )
    raise DataError(
        f"{names}: only {manifest.supervised_tokens:,} of {manifest.tokens:,} tokens ({share:.3%}) are supervised, "
        f"less than data.min_supervised ({data.min_supervised:.3%}); see `bigtune inspect`, or lower it if meant so"
    )


def _refuse_to_replace(store_path: Path, before: Manifest | None, keep: str | None) -> None:
    if before is not None and keep is not None and before.fingerprint == keep:
        raise DataError(
            f"{store_path}: a source or the tokenizer changed since this run was started; change it back to go on "
            "with the run, start a new one with another output, or go on with --new-data from the next epoch on"
        )


def _manifest_or_none(store_path: Path) -> Manifest | None:
    try:
        return read_manifest(store_path)
    except DataError:
        return None
