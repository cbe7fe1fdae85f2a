"""The raw rows of one file, in chunks: undecoded where that can wait for another process, whole rows always.

    file ──read_chunks──▶ Chunk ──(another process)──▶ rows_of ──▶ (row number, value)
    file ──list_blocks──▶ Block ──read_block──▶ Chunks, from anywhere in the file

Text is cut here, tables in `delimited`, arrays in `json_array`, and Parquet and Arrow in `columns`.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtune.data import delimited, json_array
from bigtune.data.sources import SourceFile, UnreadableFile, open_bytes, reading, stat_of
from bigtune.data.values import BOM, BadRow

MAX_ROW_BYTES = 1 << 30  # a file without line ends, or of NUL bytes, must not fill the memory
PIECE_BYTES = 1 << 20  # read at once where rows are not cut by line


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one file, for a worker to decode."""

    file: SourceFile
    index: int  # from 0 within the file, or the index of the block
    first_row: int  # from 1; for JSONL the line, as an editor counts
    payload: Any  # JSONL: whole lines; Parquet, Arrow, data sets: an Arrow stream; else a list

    @property
    def size(self) -> int:
        """In bytes, about."""
        return _size_of(self.payload)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a file that can be read by itself; all of it where it can be read from its start only."""

    file: SourceFile
    index: int  # from 0 within the file
    start: int  # in bytes (JSONL, Arrow streams), row groups (Parquet), record batches (Arrow), or rows (data sets)
    end: int
    size: int  # in bytes, about, and before any compression of the whole file
    whole: bool = False


def read_chunks(file: SourceFile, chunk_bytes: int) -> Iterator[Chunk]:
    """All rows of a file in order, about so many bytes a chunk; a row that is longer is a chunk of its own.

    Chunks are a function of the file's contents and of `chunk_bytes`. Memory holds a few chunks at once, and
    for Parquet and compressed Arrow a batch.

    Raises:
        UnreadableFile: the file cannot be opened, is damaged, cut off, or not what its name says.
    """
    first_row = 1
    with _reading(file):
        for index, (payload, rows) in enumerate(_payloads(file, chunk_bytes)):
            yield Chunk(file, index, first_row, payload)
            first_row += rows


def rows_of(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """Row numbers and rows: a value, the undecoded bytes of a JSON value, or a `BadRow` in its place."""
    if chunk.file.kind == "jsonl":
        for number, line in enumerate(chunk.payload.split(b"\n"), chunk.first_row):
            line = line.removeprefix(BOM)
            if line.strip():
                yield number, line
    elif chunk.file.kind in ("csv", "tsv"):
        yield from enumerate(delimited.table_rows(chunk.payload), chunk.first_row)
    elif isinstance(chunk.payload, bytes):
        from bigtune.data.columns import column_rows

        yield from enumerate(column_rows(chunk.payload), chunk.first_row)
    else:
        yield from enumerate(chunk.payload, chunk.first_row)


def list_blocks(file: SourceFile, block_bytes: int) -> list[Block]:
    """The blocks of a file, in order, of about `block_bytes`, or of the file's own smallest units (row groups, record
    batches), which may be much larger. A file that can only be read from its start is one block.

    Raises:
        UnreadableFile: as `read_chunks`.
    """
    with _reading(file):
        ranges = _ranges(file, block_bytes)
        if ranges is None:
            return [Block(file, 0, 0, 0, (stat_of(file) or [0])[0], whole=True)]
    return [Block(file, index, *span) for index, span in enumerate(ranges)]


def _ranges(file: SourceFile, block_bytes: int) -> list[tuple[int, int, int]] | None:
    """(start, end, bytes) of each block; None where there is no telling."""
    if file.compression is not None or file.kind in ("json", "csv", "tsv", "text"):
        return None
    if file.kind == "jsonl":
        size = Path(file.path).stat().st_size
        ends = [(start, min(start + block_bytes, size)) for start in range(0, size, block_bytes)]
        return [(start, end, end - start) for start, end in ends]
    from bigtune.data import columns, hub

    if file.kind == "dataset":
        return list(hub.row_ranges(hub.load(file.dataset, file.config, file.split), block_bytes))
    if file.kind == "parquet":
        return list(columns.parquet_blocks(file.path, block_bytes))
    return columns.arrow_blocks(file.path, block_bytes)


def read_block(block: Block, chunk_bytes: int) -> Iterator[Chunk]:
    """The rows of one block, for JSONL the lines that begin in it, about so many bytes a chunk (but JSONL is one).
    Rows are counted from 1 within the block.

    Raises:
        UnreadableFile: as `read_chunks`.
    """
    file, start, end = block.file, block.start, block.end
    if block.whole:
        yield from read_chunks(file, chunk_bytes)
        return
    with _reading(file):
        if file.kind == "jsonl":
            yield Chunk(file, block.index, 1, _lines_from(file.path, start, end))
            return
        from bigtune.data import columns, hub

        if file.kind == "dataset":
            batches = hub.rows_in(hub.load(file.dataset, file.config, file.split), start, end)
        elif file.kind == "parquet":
            batches = columns.parquet_block(file.path, start, end, chunk_bytes)
        else:
            batches = columns.arrow_block(file.path, start, end)
        first_row = 1
        for payload, rows in columns.payloads_of(batches, chunk_bytes, file.path):
            yield Chunk(file, block.index, first_row, payload)
            first_row += rows


@contextmanager
def _reading(file: SourceFile) -> Iterator[None]:
    with reading(file.path):
        if file.kind not in ("parquet", "arrow", "dataset"):
            yield
            return
        from bigtune.data.columns import reading_columns

        with reading_columns(file.path):
            yield


def _payloads(file: SourceFile, chunk_bytes: int) -> Iterator[tuple[Any, int]]:
    """Payloads, each with its number of rows, or of lines for JSONL."""
    if file.kind == "dataset":
        from bigtune.data import columns, hub

        batches = hub.batches(hub.load(file.dataset, file.config, file.split))
        yield from columns.payloads_of(batches, chunk_bytes, file.path)
        return
    if file.kind in ("parquet", "arrow"):
        from bigtune.data import columns

        yield from columns.payloads_of(columns.batches_of(file, chunk_bytes), chunk_bytes, file.path)
        return
    with open_bytes(file.path, file.compression) as stream:
        if file.kind in ("csv", "tsv"):
            delimiter = "," if file.kind == "csv" else "\t"
            yield from delimited.read_table(stream, file.path, delimiter, chunk_bytes, MAX_ROW_BYTES)
        elif file.kind == "json":
            yield from _values(_pieces(stream, PIECE_BYTES), file.path, chunk_bytes)
        elif file.kind == "text":
            yield [_whole_text(stream, file.path)], 1
        else:
            yield from _lines(_pieces(stream, chunk_bytes), file.path, chunk_bytes)


def _pieces(stream: Any, size: int) -> Iterator[bytes]:
    """Exactly so many bytes each, but for the last, however the stream hands them out."""
    while piece := stream.read(size):
        parts, missing = [piece], size - len(piece)
        while missing and (piece := stream.read(missing)):
            parts.append(piece)
            missing -= len(piece)
        yield b"".join(parts)


def _lines(pieces: Iterator[bytes], path: str, chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines, with their number. What is held back between pieces is one line's beginning."""
    held: list[bytes] = []
    size = 0
    for number, piece in enumerate(pieces):
        if number == 0:
            _check_encoding(piece, path)
        # A long line goes alone; else all whole lines of the piece go together.
        for find in (bytes.find, bytes.rfind) if size >= chunk_bytes else (bytes.rfind,):
            end = find(piece, b"\n") + 1
            if end:
                lines = b"".join([*held, piece[:end]])
                yield lines, lines.count(b"\n")
                held, size, piece = [], 0, piece[end:]
        held.append(piece)
        size += len(piece)
        if size > MAX_ROW_BYTES:
            raise UnreadableFile(f"{path}: a line of more than {MAX_ROW_BYTES:,} bytes; this is no JSONL")
    if size:
        yield b"".join(held), 1


def _lines_from(path: str, start: int, end: int) -> bytes:
    """The lines that begin in [start, end), the last one whole."""
    with Path(path).open("rb") as file:
        if start == 0:
            _check_encoding(file.read(4), path)
        # From the byte before: where it ends a line, the next one begins right here.
        position = max(start - 1, 0)
        file.seek(position)
        while start > 0:
            tail = file.readline(min(PIECE_BYTES, end - position))
            position += len(tail)
            if tail.endswith(b"\n"):
                break
            if position >= end or not tail:
                return b""
        lines = file.read(end - position)
        if lines and not lines.endswith(b"\n"):
            lines += file.readline(MAX_ROW_BYTES)
        return lines


def _values(pieces: Iterator[bytes], path: str, chunk_bytes: int) -> Iterator[tuple[list[bytes], int]]:
    values: list[bytes] = []
    size = 0
    for value in json_array.read_array(pieces, path, MAX_ROW_BYTES):
        values.append(value)
        size += len(value)
        if size >= chunk_bytes:
            yield values, len(values)
            values, size = [], 0
    if values:
        yield values, len(values)


def _whole_text(stream: Any, path: str) -> Any:
    """The one row of a plain text; line ends are those of Unix, as Python reads any text."""
    data = b"".join(itertools.islice(_pieces(stream, PIECE_BYTES), MAX_ROW_BYTES // PIECE_BYTES + 1))
    if len(data) > MAX_ROW_BYTES:
        raise UnreadableFile(f"{path}: a text of more than {MAX_ROW_BYTES:,} bytes is one document; split the file")
    _check_encoding(data, path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f" (byte {error.start + 1} of the file)")
    return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _size_of(payload: Any) -> int:
    if isinstance(payload, bytes | str):
        return len(payload)
    if isinstance(payload, dict):
        payload = list(payload.values())
    return sum(map(_size_of, payload)) if isinstance(payload, list) else 0


def _check_encoding(head: bytes, path: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UnreadableFile(f"{path}: UTF-16 or UTF-32, by its first bytes; save it as UTF-8")
