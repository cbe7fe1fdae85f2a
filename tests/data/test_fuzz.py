"""Whatever the bytes: rows, bad rows, or one line that names the file. Never a traceback, a hang or a lost row."""

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtune.config import Source
from bigtune.data import files
from bigtune.data.files import list_blocks, read_block, read_chunks, rows_of
from bigtune.data.formats import BadRow, conversations_of
from bigtune.data.json_array import read_array
from bigtune.data.sources import ROW_KEYS, TURN_KEYS, SourceFile, UnreadableFile, resolve_sources
from bigtune.errors import DataError
from tests.data import containers

SOURCE = Source(path=Path("a"))
quick = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))

KEYS = st.sampled_from([*ROW_KEYS, *TURN_KEYS, "function", "arguments", "type"])
WORDS = st.sampled_from(
    ["user", "assistant", "system", "tool", "function_call", "text", "[]", "{}", "", "\0", "\ud800"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25
)
CHATS = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": WORDS, "content": WORDS | st.text(max_size=5)},
                optional={"tool_calls": VALUES, "weight": VALUES, "train": VALUES, "name": VALUES},
            ),
            max_size=5,
        )
    },
    optional={"tools": VALUES, "id": VALUES, "tags": VALUES, "system": VALUES},
)


@contextmanager
def file_of(data: bytes, name: str) -> Iterator[SourceFile]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        [file], _ = resolve_sources([Source(path=path)])
        yield file


def outcome(file: SourceFile, chunk_bytes: int = 50) -> tuple[int, int]:
    """Rows that were read and rows that were refused."""
    read = refused = 0
    for chunk in read_chunks(file, chunk_bytes):
        for row, value in rows_of(chunk):
            try:
                conversations = conversations_of(value, file.path, row, SOURCE)
            except BadRow as bad:
                refused += 1
                assert bad.reason and "\n" not in str(bad) and len(str(bad)) < 1000
            else:
                read += 1
                assert conversations
                assert all(isinstance(conversation.content_hash, int) for conversation in conversations)
    return read, refused


@quick
@given(value=VALUES | CHATS)
def test_any_value_is_conversations_or_a_bad_row(value: Any) -> None:
    try:
        conversations = conversations_of(value, "a", 1, SOURCE)
    except BadRow as bad:
        assert bad.reason
    else:
        for conversation in conversations:
            assert conversation.messages or conversation.text.strip()
            json.dumps([dict(message.extra) for message in conversation.messages], allow_nan=False).encode()


@quick
@given(
    lines=st.lists(st.binary(max_size=30) | VALUES.map(json.dumps).map(str.encode), max_size=12),
    size=st.integers(1, 99),
)
def test_every_line_that_is_not_blank_is_read_or_refused(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    wanted = sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in data.split(b"\n"))
    with file_of(data, "a.jsonl") as file:
        if file.kind == "jsonl" and file.compression is None and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            assert sum(outcome(file, size)) == wanted


@quick
@given(
    data=st.lists(st.sampled_from([b"\n", b"a", b'{"text": "x"}\n', b"\r\n", b"long" * 20]), max_size=40).map(b"".join),
    block_bytes=st.integers(1, 200),
)
def test_blocks_of_any_size_hold_every_line_once(data: bytes, block_bytes: int) -> None:
    with file_of(data, "a.jsonl") as file:
        blocks = list_blocks(file, block_bytes)
        held = [line for block in blocks for chunk in read_block(block, 50) for _, line in rows_of(chunk)]
        assert held == [line for chunk in read_chunks(file, 1 << 20) for _, line in rows_of(chunk)]


def test_a_reader_of_blocks_that_loses_a_line_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = files._lines_from
    monkeypatch.setattr(files, "_lines_from", lambda path, start, end: honest(path, start + bool(start), end))
    with pytest.raises(AssertionError):
        test_blocks_of_any_size_hold_every_line_once()


TOKENS = [*'[]{},: \n"\\', '"a"', "1", "0", "-", "1.5e", "+7", "e", "tru", "null", "NaN", "-Infinity", "é"]
TOKENS += ["\\ud83d", "\\ude00", "\\u12"]


def pieces_of(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        yield data[at : at + size]
        at += size


@quick
@given(values=st.lists(VALUES, max_size=8), sizes=st.lists(st.integers(1, 40), min_size=1), ascii=st.booleans(),
       indent=st.none() | st.integers(0, 40))  # fmt: skip
def test_an_array_in_pieces_is_what_json_makes_of_it_whole(
    values: list[Any], sizes: list[int], ascii: bool, indent: int | None
) -> None:
    text = json.dumps(values, ensure_ascii=ascii, indent=indent)
    data = text.encode("utf-8", "replace")  # half surrogate pairs can only be escaped
    read = [json.loads(value) for value in read_array(pieces_of(data, sizes), "a", 1 << 20)]
    assert repr(read) == repr(json.loads(data))  # repr, since NaN is not equal to itself


@quick
@given(
    tokens=st.lists(st.sampled_from(TOKENS), max_size=25),
    sizes=st.lists(st.integers(1, 9), min_size=1),
)  # fmt: skip
def test_an_array_in_pieces_is_refused_just_where_json_refuses_the_whole(tokens: list[str], sizes: list[int]) -> None:
    data = ("[" + "".join(tokens)).encode()
    try:
        wanted = repr(json.loads(data))
    except ValueError:
        wanted = "refused"
    if not wanted.startswith("["):
        wanted = "refused"
    try:
        read = repr([json.loads(value) for value in read_array(pieces_of(data, sizes), "a", 1 << 20)])
    except UnreadableFile:
        read = "refused"
    assert read == wanted


ROWS = [{"question": f"{i}?", "answer": "é" * i, "tags": ["x"] * (i % 3)} for i in range(1, 12)]


@pytest.mark.parametrize("name", containers.CONTAINERS)
@quick
@given(st.data())
def test_a_damaged_file_is_rows_or_one_line(name: str, data: st.DataObject) -> None:
    whole = bytearray(containers.CONTAINERS[name](ROWS))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    with file_of(bytes(cut), name) as file:
        try:
            outcome(file)
            for block in list_blocks(file, 100):
                for chunk in read_block(block, 50):
                    list(rows_of(chunk))
        except DataError as error:
            assert file.path in str(error) and "\n" not in str(error)


@quick
@given(data=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet",
                                                           "a.arrow", "a.csv.gz", "a.unknown"]),
       packed=st.booleans())  # fmt: skip
def test_any_bytes_under_any_name_are_rows_or_one_line(data: bytes, name: str, packed: bool) -> None:
    with file_of(gzip.compress(data) if packed else data, name) as file:
        try:
            outcome(file)
        except DataError as error:
            assert file.path in str(error) and "\n" not in str(error)


@quick
@given(cells=st.lists(st.lists(st.text(max_size=6), min_size=2, max_size=2), max_size=8), size=st.integers(1, 50))
def test_every_row_of_a_table_comes_back_as_it_was_written(cells: list[list[str]], size: int) -> None:
    rows = [dict(zip(("q", "a"), (cell.replace("\0", "") for cell in row), strict=True)) for row in cells]
    data = containers.table([{"q": "first", "a": "row"}, *rows])
    with file_of(data, "a.csv") as file:
        read = [value for chunk in read_chunks(file, size) for _, value in rows_of(chunk)]
    assert read[1:] == rows
