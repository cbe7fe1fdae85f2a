"""CSV and TSV → rows of strings, under the names of a header row. Quoting is as in RFC 4180."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from bigtune.data.sources import UnreadableFile
from bigtune.data.values import BadRow


def read_table(stream: Any, path: str, delimiter: str, chunk_bytes: int, max_row: int) -> Iterator[tuple[Any, int]]:
    """Payloads of about so many characters, each with its number of rows: the header, then lists of cells.

    Raises:
        UnreadableFile: the header cannot be used, or a quote is never closed.
    """
    # What is no UTF-8 comes through as half surrogate pairs, and is refused row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = _records(text, path, delimiter, max_row)
    header = next(records, None)
    if header is None:
        return
    _check_header(header, path)
    payload, size = [header], 0
    for record in records:
        payload.append(record)
        size += sum(map(len, record)) if isinstance(record, list) else 0
        if size >= chunk_bytes:
            yield payload, len(payload) - 1
            payload, size = [header], 0
    if len(payload) > 1:
        yield payload, len(payload) - 1


def table_rows(payload: list[Any]) -> Iterator[Any]:
    """A row is an object of strings, or the `BadRow` that says why it is none."""
    header, *records = payload
    for record in records:
        if isinstance(record, BadRow):
            yield record
        elif len(record) != len(header):
            yield BadRow("wrong number of columns", f" ({len(record)}, where the header has {len(header)})")
        elif any(not cell.isascii() and _is_broken(cell) for cell in record):
            yield BadRow("not UTF-8")
        else:
            yield dict(zip(header, record, strict=True))


def _records(text: io.TextIOWrapper, path: str, delimiter: str, max_row: int) -> Iterator[Any]:
    """Lists of cells; a `BadRow` where quotes stand wrong. Blank lines are none."""
    csv.field_size_limit(max(csv.field_size_limit(), max_row))  # of this process: the module has no other
    lines = _Lines(text, path, max_row)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = lines.count + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            if lines.ended or "field limit" in str(error):  # all that follows was taken for one cell
                raise UnreadableFile(f"{path}: the quote that opens in line {start} is never closed; mend it") from None
            yield BadRow("broken CSV", f" (line {lines.count}: {error})")
            continue
        if record is None:
            return
        if record:
            yield record


class _Lines:
    """The lines of a text, as the csv module asks for them; knows how many, and whether that was all."""

    def __init__(self, text: io.TextIOWrapper, path: str, max_row: int) -> None:
        self._text, self._path, self._max_row = text, path, max_row
        self.count, self.ended = 0, False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._max_row)
        self.ended = not line
        if self.ended:
            raise StopIteration
        self.count += 1
        if len(line) == self._max_row:
            raise UnreadableFile(f"{self._path}: line {self.count} has more than {self._max_row:,} characters; mend it")
        return line


def _check_header(header: Any, path: str) -> None:
    if isinstance(header, list) and header[0].startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise UnreadableFile(f"{path}: UTF-16 or UTF-32, by its first bytes; save it as UTF-8")
    if isinstance(header, BadRow) or any(_is_broken(name) for name in header):
        raise UnreadableFile(f"{path}: the header row is no UTF-8, or its quotes stand wrong; mend it")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UnreadableFile(f"{path}: two columns are named {repeated[0]!r}; rename one in the header row")


def _is_broken(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
