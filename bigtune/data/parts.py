"""One chunk of a source file → one part of the document store. Worker processes run this, one chunk at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bigtune.data.arrow import arrow_lists, arrow_numbers
from bigtune.data.conversation import Conversation, hash64
from bigtune.data.document import Document
from bigtune.data.features import feature_schema, features
from bigtune.data.files import Chunk, rows_of
from bigtune.data.formats import BadRow, conversations_of, fields_in
from bigtune.data.manifest import PartCounts
from bigtune.data.recipe import Recipe
from bigtune.data.store import SCHEMA, write_part
from bigtune.errors import DataError

BATCH_CHARACTERS = 2**20
"""Text of conversations that are looked at together."""

REFUSED = "refused by the chat template"


@dataclass
class Collected:
    """Documents and what they came from, side by side."""

    documents: list[Document] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # positions in `conversations`
    conversations: list[Conversation] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    rows: int = 0
    split_rows: int = 0
    fields: set[str] = field(default_factory=set)  # of the source's, those that a row had


def make_part(recipe: Recipe, chunk: Chunk, path: Path) -> PartCounts:
    """Write the part of a chunk, and return its counts.

    Raises:
        DataError: it cannot be written.
    """
    collected = collect(recipe, chunk)
    return write_part(path, _record_batch(collected, recipe), _counts(collected))


def collect(recipe: Recipe, chunk: Chunk) -> Collected:
    """The documents of a chunk, in the order of its rows; rows that cannot be used are told of."""
    collected = Collected()
    for batch in _batches(_conversations(recipe, chunk, collected)):
        for conversation, result in zip(batch, recipe.chat.encode(batch), strict=True):
            if isinstance(result, DataError):
                told = str(result).removeprefix(f"{conversation.where}: ")  # parts know no paths
                collected.bad.append((conversation.row, REFUSED, told))
                continue
            collected.owners += [len(collected.conversations)] * len(result)
            collected.conversations.append(conversation)
            collected.documents += result
            collected.parts += range(len(result))
            collected.split_rows += len(result) > 1
    collected.bad.sort()
    return collected


def _conversations(recipe: Recipe, chunk: Chunk, collected: Collected) -> Iterator[Conversation]:
    source = recipe.sources[chunk.file.source]
    for row, value in rows_of(chunk):
        collected.rows += 1
        if len(collected.fields) < len(source.fields):
            collected.fields |= fields_in(value, source.fields)
        try:
            yield from conversations_of(value, chunk.file.path, row, source)
        except BadRow as bad:
            collected.bad.append((row, bad.reason, str(bad)))


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    size = 0
    for conversation in conversations:
        batch.append(conversation)
        size += conversation.characters
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counts(collected: Collected) -> PartCounts:
    lengths = [len(document) for document in collected.documents]
    return PartCounts(
        rows=collected.rows,
        documents=len(lengths),
        conversations=sum(bool(collected.conversations[owner].messages) for owner in collected.owners),
        tokens=sum(lengths),
        supervised_tokens=sum(document.supervised for document in collected.documents),
        longest_tokens=max(lengths, default=0),
        highest_token=max((int(document.input_ids.max(initial=0)) for document in collected.documents), default=0),
        split_rows=collected.split_rows,
        fields=sorted(collected.fields),
        bad=collected.bad,
    )


def _record_batch(collected: Collected, recipe: Recipe) -> pa.RecordBatch:
    owners = np.array(collected.owners, np.int64)
    documents, of = collected.documents, [collected.conversations[owner] for owner in collected.owners]
    columns = [
        _lists([document.input_ids for document in documents], np.int32),
        _lists([document.spans.reshape(-1) for document in documents], np.int32),
        _lists([document.weights for document in documents], np.float32),
        arrow_numbers(np.array([document.supervised for document in documents], np.int32)),
        arrow_numbers(np.array([conversation.row for conversation in of], np.int64)),
        arrow_numbers(np.array(collected.parts, np.int32)),
        arrow_numbers(np.array([conversation.content_hash for conversation in of], np.uint64)),
        arrow_numbers(np.array([hash64(conversation.id) if conversation.id else 0 for conversation in of], np.uint64)),
    ]
    schema = list(SCHEMA)
    extra = feature_schema(recipe.clean)
    if extra:
        made = features(collected.conversations, recipe.clean, recipe.overlap)
        columns += [made[column.name].take(arrow_numbers(owners)) for column in extra]
        schema += extra
    return pa.record_batch(columns, schema=pa.schema(schema))


def _lists(arrays: Sequence[npt.NDArray[Any]], kind: type[np.generic]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64).astype(np.int32)
    return arrow_lists(offsets, np.concatenate(arrays, dtype=kind) if arrays else np.empty(0, kind))
