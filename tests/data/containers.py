"""The same rows in every kind of file that bigtune reads."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

Rows = Sequence[dict[str, Any]]


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: Rows) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def table(rows: Rows, delimiter: str = ",") -> bytes:
    """Nested values as JSON, a missing one as an empty cell."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(header)
    for row in rows:
        cells = [row.get(key) for key in header]
        writer.writerow(["" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells])
    return text.getvalue().encode()


def columns(rows: Rows) -> pa.Table:
    """With the keys of all rows, where Arrow itself looks at the first alone."""
    return pa.table({key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)})


def parquet(rows: Rows, group: int = 3) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(columns(rows), sink, row_group_size=group)
    return bytes(sink.getvalue().to_pybytes())


def arrow(rows: Rows, new: Any = pa.ipc.new_stream, batch: int = 3) -> bytes:
    whole = columns(rows)
    sink = pa.BufferOutputStream()
    with new(sink, whole.schema) as writer:
        for part in whole.to_batches(max_chunksize=batch):
            writer.write_batch(part)
    return bytes(sink.getvalue().to_pybytes())


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def frames(data: bytes) -> bytes:
    """Cut in the middle of a row, and each half compressed by itself."""
    half = len(data) // 2
    return zstd(data[:half]) + zstd(data[half:])


def members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:])


# File names with what writes them; names say nothing of the compression, which is told by the content.
CONTAINERS: dict[str, Callable[[Rows], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.json": array,
    "rows.csv": table,
    "rows.tsv": lambda rows: table(rows, "\t"),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "no_ending": jsonl,
    "packed.jsonl": lambda rows: members(jsonl(rows)),
    "rows.jsonl.zst": lambda rows: frames(jsonl(rows)),
    "rows.json.gz": lambda rows: members(array(rows)),
    "packed.json": lambda rows: frames(array(rows)),
    "rows.csv.gz": lambda rows: gzip.compress(table(rows)),
    "rows.tsv.zstd": lambda rows: zstd(table(rows, "\t")),
    "rows.parquet.gz": lambda rows: gzip.compress(parquet(rows)),
    "rows.arrow.zst": lambda rows: zstd(arrow(rows)),
    "file.arrow.gz": lambda rows: gzip.compress(arrow(rows, pa.ipc.new_file)),
}


def write(folder: Path, name: str, rows: Rows) -> Path:
    path = folder / name
    path.write_bytes(CONTAINERS[name](rows))
    return path
