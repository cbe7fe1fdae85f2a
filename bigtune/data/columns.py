"""Parquet and Arrow → batches of rows, as bytes that other processes take; and back to rows.

A payload is an Arrow stream of its own, which holds its rows alone: a pickled slice of a batch would bring
the whole batch along.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from bigtune.data.sources import SourceFile, UnreadableFile, open_bytes
from bigtune.data.values import BadRow

COPIED = 1 << 20  # bytes decompressed at once
PROBED = 16  # rows from which the size of the others is reckoned
MOST_ROWS = 1 << 12  # of a batch
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@contextmanager
def reading_columns(path: str) -> Iterator[None]:
    """What Arrow says of a broken file, in one line.

    Raises:
        UnreadableFile: the file is damaged or cut off.
    """
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter from names of columns
        reason = str(error).strip().split("\n")[0][:200]
        raise UnreadableFile(f"{path}: damaged or cut off ({reason}); mend or remove the file") from None


def batches_of(file: SourceFile, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    """All rows of a file, in order."""
    with _seekable(file) as opened:
        if file.kind == "parquet":
            yield from _parquet_batches(_open_parquet(opened, file.path), None, batch_bytes)
        else:
            yield from _checked(_arrow_batches(opened, file.path))


def payloads_of(batches: Iterable[pa.RecordBatch], chunk_bytes: int, path: str) -> Iterator[tuple[bytes, int]]:
    """Batches joined or cut to about so many bytes, each with its number of rows."""
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        if len(set(batch.schema.names)) < len(batch.schema.names):
            raise UnreadableFile(f"{path}: two columns have the same name; rename one")
        for part in _cut(batch, chunk_bytes):
            held.append(part)
            size += part.nbytes
            if size >= chunk_bytes:
                yield _pack(held), sum(part.num_rows for part in held)
                held, size = [], 0
    if held:
        yield _pack(held), sum(part.num_rows for part in held)


def column_rows(payload: bytes) -> Iterator[Any]:
    """A row is an object without null values, since a table cannot leave a key out; or a `BadRow`."""
    for batch in pa.ipc.open_stream(payload):
        try:
            rows = batch.to_pylist()
        except (UnicodeDecodeError, ValueError, OverflowError):
            rows = [_row_at(batch, i) for i in range(batch.num_rows)]
        yield from map(_without_nulls, rows)


def parquet_blocks(path: str, block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of row groups of about so many bytes, and the bytes."""
    metadata = _open_parquet(path, path).metadata
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= block_bytes or group + 1 == metadata.num_row_groups:
            yield start, group + 1, size
            start, size = group + 1, 0


def parquet_block(path: str, start: int, end: int, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    """The rows of some row groups, in order."""
    yield from _parquet_batches(_open_parquet(path, path), list(range(start, end)), batch_bytes)


def _parquet_batches(parquet: Any, groups: list[int] | None, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    # What a row takes is seen from some: a text that all rows share is stored once, and is read again for each.
    some = next(parquet.iter_batches(batch_size=PROBED, row_groups=groups), None)
    if some is not None:
        rows = batch_bytes * some.num_rows // max(some.nbytes, 1)
        yield from parquet.iter_batches(batch_size=min(max(rows, 1), MOST_ROWS), row_groups=groups)


def arrow_blocks(path: str, block_bytes: int) -> list[tuple[int, int, int]] | None:
    """Ranges of record batches (file format) or of bytes (stream format), and their bytes. None where dictionaries
    stand between."""
    with pa.memory_map(path) as mapped:  # so that finding where batches begin reads nothing else
        if _is_file_format(mapped):
            count = pa.ipc.open_file(mapped).num_record_batches
            each = mapped.size() // max(count, 1)
            step = max(1, block_bytes // max(each, 1))
            ends = [(start, min(start + step, count)) for start in range(0, count, step)]
            return [(start, end, (end - start) * each) for start, end in ends]
        _check_stream_end(mapped, path)
        starts: list[int] = []
        kinds: set[str] = set()
        at = 0
        while (message := _next_message(mapped)) is not None:
            kinds.add(message.type)
            if message.type == "record batch" and (not starts or at - starts[-1] >= block_bytes):
                starts.append(at)
            at = mapped.tell()
        if "dictionary" in kinds:
            return None
        return [(start, end, end - start) for start, end in itertools.pairwise([*starts, at])]


def arrow_block(path: str, start: int, end: int) -> Iterator[pa.RecordBatch]:
    with _open_arrow(path) as source:
        if _is_file_format(source):
            reader = pa.ipc.open_file(source)
            yield from _checked(reader.get_batch(i) for i in range(start, end))
            return
        schema = pa.ipc.read_schema(source)
        source.seek(start)
        while source.tell() < end:
            yield from _checked([pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)])


@contextmanager
def _seekable(file: SourceFile) -> Iterator[Any]:
    """The path, or, since tables are read from their end, a temporary copy of a compressed file."""
    if file.compression is None:
        yield file.path
        return
    with tempfile.TemporaryFile() as copy, open_bytes(file.path, file.compression) as packed:
        while piece := packed.read(COPIED):
            copy.write(piece)
        copy.seek(0)
        yield copy


def _open_parquet(opened: Any, path: str) -> Any:
    """Read through a buffer, so that memory does not grow with the row groups."""
    parquet = pa.parquet.ParquetFile(opened, buffer_size=COPIED, pre_buffer=False, page_checksum_verification=True)
    names = parquet.schema_arrow.names
    if len(set(names)) < len(names):
        raise UnreadableFile(f"{path}: two columns have the same name; rename one")
    return parquet


def _arrow_batches(opened: Any, path: str) -> Iterator[pa.RecordBatch]:
    with _open_arrow(opened) as source:
        if _is_file_format(source):
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            _check_stream_end(source, path)
            yield from pa.ipc.open_stream(source)


def _open_arrow(opened: Any) -> Any:
    """Streams are read, in batches; a file is mapped, since it often holds all rows in one batch."""
    if not isinstance(opened, str):
        return pa.PythonFile(opened, mode="r")
    with pa.OSFile(opened) as source:
        mapped = _is_file_format(source)
    return pa.memory_map(opened) if mapped else pa.OSFile(opened)


def _is_file_format(source: Any) -> bool:
    """Leaves the source at its start."""
    source.seek(0)
    head = source.read(6)
    source.seek(0)
    return bytes(head) == b"ARROW1"


def _check_stream_end(source: Any, path: str) -> None:
    """Without its mark a stream may have lost whole batches, and Arrow would not say so."""
    size = source.size()
    source.seek(max(size - len(END_OF_STREAM), 0))
    mark = source.read(len(END_OF_STREAM))
    source.seek(0)
    if mark != END_OF_STREAM:
        raise UnreadableFile(f"{path}: damaged or cut off (no end-of-stream mark); mend or remove the file")


def _next_message(source: Any) -> Any:
    try:
        return pa.ipc.read_message(source)
    except EOFError:
        return None


def _checked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """A file's offsets are used as they are, so that wrong ones would read foreign memory."""
    for batch in batches:
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            if "Invalid UTF8" not in str(error):
                raise
            # That is the concern of single rows, but it kept Arrow from looking at the rest.
            for column in batch.columns:
                column.view(_as_binary(column.type)).validate(full=True)
        yield batch


def _as_binary(kind: pa.DataType) -> pa.DataType:
    """The type of the same layout whose strings may be any bytes."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_binary(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_binary(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_binary(kind.value_type)))
    return kind


def _cut(batch: pa.RecordBatch, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
    if batch.num_rows < 2 or batch.nbytes <= chunk_bytes:
        yield from [batch] if batch.num_rows else []
        return
    half = batch.num_rows // 2
    yield from _cut(batch.slice(0, half), chunk_bytes)
    yield from _cut(batch.slice(half), chunk_bytes)


def _pack(batches: Sequence[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _row_at(batch: pa.RecordBatch, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, OverflowError) as error:
        return BadRow("unreadable value", f" ({str(error)[:100]})")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value
