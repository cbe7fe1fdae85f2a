"""Whatever the file, its rows come out once each, in order, in bounded parts; a damaged one says so."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from bigtune.config import Source
from bigtune.data import files, hub
from bigtune.data.files import Block, Chunk, list_blocks, read_block, read_chunks, rows_of
from bigtune.data.sources import SourceFile, UnreadableFile, resolve_sources
from tests.data import containers
from tests.data.containers import CONTAINERS

ROWS = [{"question": f"{i}? é 😀", "answer": 'line\nanother, "quoted"\r\nlast' * i} for i in range(20)]

BY_BLOCKS = ("rows.jsonl", "no_ending", "rows.parquet", "rows.arrow", "file.arrow")


def found(path: Path) -> SourceFile:
    [file], _ = resolve_sources([Source(path=path)])
    return file


def decoded(chunks: list[Chunk]) -> list[tuple[int, Any]]:
    rows = [row for chunk in chunks for row in rows_of(chunk)]
    return [(number, json.loads(value) if isinstance(value, bytes) else value) for number, value in rows]


def read(path: Path, chunk_bytes: int = 1000) -> list[Any]:
    return [value for _, value in decoded(list(read_chunks(found(path), chunk_bytes)))]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("chunk_bytes", [1, 150, 1 << 20])
def test_every_container_gives_the_same_rows_numbered_from_1_whatever_the_chunks(
    tmp_path: Path, name: str, chunk_bytes: int
) -> None:
    chunks = list(read_chunks(found(containers.write(tmp_path, name, ROWS)), chunk_bytes))
    assert decoded(chunks) == list(enumerate(ROWS, start=1))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert (len(chunks) == 1) == (chunk_bytes > 1 << 10)


@pytest.mark.parametrize("name", CONTAINERS)
def test_chunks_are_the_same_each_time_and_can_travel_to_another_process(tmp_path: Path, name: str) -> None:
    file = found(containers.write(tmp_path, name, ROWS))
    chunks = list(read_chunks(file, 200))
    assert pickle.loads(pickle.dumps(chunks)) == chunks == list(read_chunks(file, 200))


def test_compressed_lines_are_cut_where_plain_ones_are(tmp_path: Path) -> None:
    plain, packed = (containers.write(tmp_path, name, ROWS) for name in ("rows.jsonl", "rows.jsonl.zst"))
    cuts = [[c.payload for c in read_chunks(found(path), 300)] for path in (plain, packed)]
    assert cuts[0] == cuts[1] and len(cuts[0]) > 3


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_chunk_of_columns_carries_its_own_rows_alone(tmp_path: Path, name: str) -> None:
    many = [{"text": f"{i} " * 300} for i in range(100)]
    path = containers.write(tmp_path, name, many)
    sizes = [len(pickle.dumps(chunk)) for chunk in read_chunks(found(path), 5000)]
    assert len(sizes) > 10 and max(sizes) < 12_000 < len(path.read_bytes())


def test_a_long_row_goes_alone_and_small_rows_go_together(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "a"}] * 3 + [{"text": "b" * 5000}] + [{"text": "c"}] * 3
    chunks = list(read_chunks(found(written(tmp_path / "a.jsonl", containers.jsonl(rows))), 100))
    assert [len(list(rows_of(chunk))) for chunk in chunks] == [3, 1, 3]
    assert [chunk.first_row for chunk in chunks] == [1, 4, 5]


def test_lines_are_numbered_as_an_editor_does_through_blank_ones_and_windows_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a":1}\r\n\r\n \n{"b":2}\n\xef\xbb\xbf{"c":3}')
    for chunk_bytes in (1, 7, 1000):
        assert decoded(list(read_chunks(found(path), chunk_bytes))) == [(1, {"a": 1}), (4, {"b": 2}), (5, {"c": 3})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.unknown"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\r\n \n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    if name[2:] in ("csv", "tsv") and b" " in content:
        return  # a line of one blank is a header
    assert read(written(tmp_path / name, content)) == []


def test_a_plain_text_is_one_row_with_the_line_ends_of_unix(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\n")) == [{"text": "one\ntwo\n"}]
    assert [value.reason for value in read(written(tmp_path / "b.txt", b"\xff"))] == ["not UTF-8"]


# Arrays


def test_an_array_is_read_with_little_of_it_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigtune.data.json_array import _Window

    held = 0

    class Watched(_Window):
        def _grow(self) -> None:
            nonlocal held
            super()._grow()
            held = max(held, len(self._text))

    monkeypatch.setattr("bigtune.data.json_array._Window", Watched)
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    path = written(tmp_path / "a.json", containers.array([{"text": "x" * 100}] * 1000))
    assert len(read(path)) == 1000 and 1000 <= held < 5000


def test_a_broken_value_in_an_array_ends_the_reading_there_and_not_at_the_end(tmp_path: Path) -> None:
    rows = b'[{"text": "a"}, {"text": nonsense}' + b', {"text": "b"}' * 100_000
    chunks = read_chunks(found(written(tmp_path / "a.json", rows)), 10)
    assert decoded([next(chunks)]) == [(1, {"text": "a"})]
    with pytest.raises(UnreadableFile, match=r"a whole JSON array \(row 2: Expecting value\); mend the file"):
        next(chunks)


def test_a_value_of_an_array_that_python_will_not_decode_is_one_row_still(tmp_path: Path) -> None:
    odd = b'{"text": "caf\xe9"}', b"9" * 5000, b'{"text": "\\udc80"}', b'"\xe2\x82"'
    path = written(tmp_path / "a.json", b"[1, " + b", ".join(odd) + b", 2]")
    for chunk_bytes in (1, 1000):
        chunks = read_chunks(found(path), chunk_bytes)
        assert [value for chunk in chunks for _, value in rows_of(chunk)] == [b"1", *odd, b"2"]


def test_a_deeply_nested_value_of_an_array_still_travels_to_another_process(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b"[" + b"[" * 900 + b"]" * 900 + b"]")
    [chunk] = read_chunks(found(path), 100)
    assert len(pickle.dumps(chunk)) > 1800


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"[1, 2", "',' or ']' should follow, not the end of the file"),
        (b"[1, 2]]", "nothing more should follow, not ']'"),
        (b'[1]\n{"text": "a"}', "nothing more should follow, not '{'"),
        (b"[1,]", "row 2: Expecting value"),
        (b'["a', "row 1: Unterminated string"),
        (b"[" * 200_000, "row 1: nested too deeply"),
        (b"[" + b'{"a":' * 200_000, "row 1: nested too deeply"),
        (b"[1" + b"\0" * 100, "should follow, not '\\x00'"),
    ],
)
def test_an_array_that_is_none_says_where(tmp_path: Path, text: bytes, complaint: str) -> None:
    with pytest.raises(UnreadableFile) as caught:
        read(written(tmp_path / "a.json", text))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


# Tables


def test_cells_keep_what_they_hold(tmp_path: Path) -> None:
    text = b'\xef\xbb\xbfq,a\r\n"two\r\nlines","a ""word"", and"\r\n\r\n007,\r\n'
    assert read(written(tmp_path / "a.csv", text)) == [
        {"q": "two\r\nlines", "a": 'a "word", and'},
        {"q": "007", "a": ""},
    ]


def test_a_cell_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    assert len(read(written(tmp_path / "a.csv", b"q,a\n1," + b"x" * 500_000))[0]["a"]) == 500_000


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"1,2,3", "wrong number of columns (3, where the header has 2)"),
        (b"1", "wrong number of columns (1, where the header has 2)"),
        (b"caf\xe9,2", "not UTF-8"),
        (b'"1"x,2', "broken CSV (line 3: "),
    ],
)
def test_a_bad_line_of_a_table_is_one_bad_row(tmp_path: Path, line: bytes, complaint: str) -> None:
    values = read(written(tmp_path / "a.csv", b"q,a\n1,2\n" + line + b"\n3,4\n"))
    assert (values[0], values[2]) == ({"q": "1", "a": "2"}, {"q": "3", "a": "4"})
    assert str(values[1]).startswith(complaint)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'q,a\n1,2\n"3,4\n5,6\n', "the quote that opens in line 3 is never closed"),
        (b"q,q\n1,2\n", "two columns are named 'q'"),
        (b"caf\xe9,a\n", "header row"),
        ('"q",a'.encode("utf-16"), "UTF-16 or UTF-32"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path: Path, text: bytes, complaint: str) -> None:
    with pytest.raises(UnreadableFile, match=complaint):
        read(written(tmp_path / "a.csv", text))


def test_a_column_leaves_out_what_is_null_but_a_line_of_json_keeps_it(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"m": [{"a": 1, "b": None}, None]}, {"m": [{"a": None, "b": "x"}], "c": 1}]
    assert read(written(tmp_path / "a.parquet", containers.parquet(rows))) == [
        {"m": [{"a": 1}, None]},
        {"m": [{"b": "x"}], "c": 1},
    ]
    assert read(written(tmp_path / "a.jsonl", containers.jsonl(rows))) == rows


@pytest.mark.parametrize("wrong", [b"\xff", b"\xc3"])
def test_a_text_in_columns_that_is_not_utf8_is_one_bad_row(tmp_path: Path, wrong: bytes) -> None:
    binary = pa.array([b"a", wrong, b"c"], pa.binary())
    listed = pa.ListArray.from_arrays([0, 1, 2, 3], binary.view(pa.string()))
    table = pa.table({"t": binary.view(pa.string()), "l": listed})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        values = read(tmp_path / name)
        assert values[::2] == [{"t": "a", "l": ["a"]}, {"t": "c", "l": ["c"]}]
        assert values[1].reason == "not UTF-8"


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["t", "t"])
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(UnreadableFile, match="two columns have the same name"):
        read(tmp_path / "a.arrow")


# Damage


@pytest.mark.parametrize("name", [name for name in CONTAINERS if not name.endswith((".jsonl", ".csv", ".tsv", "ing"))])
def test_a_file_that_is_cut_off_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    data = CONTAINERS[name](ROWS)
    for keep in (len(data) - 1, len(data) * 2 // 3, 40):
        path = written(tmp_path / name, data[:keep])
        with pytest.raises(UnreadableFile) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_an_arrow_stream_that_lost_whole_batches_is_an_error(tmp_path: Path) -> None:
    data = containers.arrow(ROWS)
    path = written(tmp_path / "a.arrow", data)
    blocks = list_blocks(found(path), 1)
    assert len(blocks) > 3
    written(path, data[: blocks[-2].start])  # Arrow itself reads this without a word
    assert sum(batch.num_rows for batch in pa.ipc.open_stream(path.read_bytes())) < len(ROWS)
    for ask in (lambda: read(path), lambda: list_blocks(found(path), 1)):
        with pytest.raises(UnreadableFile, match="no end-of-stream mark"):
            ask()


def test_offsets_that_point_outside_a_batch_are_an_error_and_no_crash(tmp_path: Path) -> None:
    texts = pa.array(["aaaa", "bbbb", "\u00e9"])
    offsets = pa.array([0, 4, 1 << 30, 10], pa.int32()).buffers()[1]
    for data in (b"aaaabbbb\xc3\xa9", b"\xff\xff\xff\xffbbbbcc"):  # the latter hides behind text that is not UTF-8
        broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(data))
        batch = pa.RecordBatch.from_arrays([texts, broken], names=["a", "b"])
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
        with pytest.raises(UnreadableFile, match="damaged or cut off"):
            read(tmp_path / "a.arrow", 1)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.parquet.gz", "a.arrow.zst"])
@pytest.mark.parametrize("content", [b"", b"not at all", b"\x1f\x8b broken", b"\x28\xb5\x2f\xfd broken", b"PAR1PAR1"])
def test_a_file_that_is_not_what_it_says_is_no_traceback(tmp_path: Path, name: str, content: bytes) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(UnreadableFile, match=str(path)):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_wide_characters_are_told_by_their_mark(tmp_path: Path, name: str, encoding: str) -> None:
    path = written(tmp_path / name, '["q"]'.encode(encoding))
    with pytest.raises(UnreadableFile, match="UTF-16 or UTF-32, by its first bytes; save it as UTF-8"):
        read(path)


def test_a_folder_in_the_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    for kind in ("jsonl", "json", "csv", "parquet", "arrow", "text"):
        with pytest.raises(UnreadableFile, match=r"cannot be read|damaged"):
            list(read_chunks(SourceFile(0, str(tmp_path), kind), 100))


def test_an_error_of_the_disk_is_an_error_that_names_the_file() -> None:
    with pytest.raises(UnreadableFile, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        list(read_chunks(SourceFile(0, "/proc/self/mem", "jsonl"), 100))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_a_file_without_end_is_given_up(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1 << 20)
    start = b'["' if name == "a.json" else b""
    with pytest.raises(UnreadableFile, match="1,048,576"):
        read(written(tmp_path / name, start + b" x" * (3 << 20)))


def test_a_file_of_nothing_but_nul_bytes_is_one_bad_row(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b"\0" * 100_000)
    assert [len(value) for _, value in rows_of(next(read_chunks(found(path), 1000)))] == [100_000]


# Blocks


def block_rows(blocks: list[Block], chunk_bytes: int = 1 << 20) -> list[Any]:
    return [value for _, value in decoded([chunk for block in blocks for chunk in read_block(block, chunk_bytes)])]


@pytest.mark.parametrize("name", BY_BLOCKS)
@pytest.mark.parametrize("block_bytes", [1, 5, 64, 400, 1 << 20])
def test_blocks_give_every_row_once_in_any_order(tmp_path: Path, name: str, block_bytes: int) -> None:
    blocks = list_blocks(found(containers.write(tmp_path, name, ROWS)), block_bytes)
    assert block_rows(blocks) == block_rows(blocks, 100) == ROWS
    assert sum(block.size for block in blocks) > 0 and not any(block.whole for block in blocks)
    backwards = [block_rows([block]) for block in reversed(blocks)]
    assert [row for rows in reversed(backwards) for row in rows] == ROWS
    assert (len(blocks) == 1) == (block_bytes > 1 << 10)
    assert pickle.loads(pickle.dumps(blocks)) == blocks


def test_reading_only_whole_lines_of_a_block_would_lose_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(path: str, start: int, end: int) -> bytes:
        """Leaves the first, half line out, though a block may begin with a whole one."""
        part = Path(path).read_bytes()[start:end]
        return part if start == 0 else part[part.find(b"\n") + 1 :]

    path = written(tmp_path / "a.jsonl", b'{"a":1}\n' * 8)
    blocks = list_blocks(found(path), 16)
    assert len(block_rows(blocks)) == 8
    monkeypatch.setattr(files, "_lines_from", lossy)
    assert len(block_rows(blocks)) < 8


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in BY_BLOCKS])
def test_a_file_that_must_be_read_from_its_start_is_one_block(tmp_path: Path, name: str) -> None:
    path = containers.write(tmp_path, name, ROWS)
    [block] = list_blocks(found(path), 100)
    assert block.whole and block.size == path.stat().st_size
    assert block_rows([block], 100) == [value for _, value in decoded(list(read_chunks(found(path), 100)))]


def test_an_arrow_stream_with_dictionaries_is_one_block(tmp_path: Path) -> None:
    table = pa.table({"t": pa.array(["a", "b", "a"]).dictionary_encode()})
    for name, new in (("s.arrow", pa.ipc.new_stream), ("f.arrow", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert [row["t"] for row in read(tmp_path / name)] == ["a", "b", "a"]
    [block] = list_blocks(found(tmp_path / "s.arrow"), 100)
    assert block.whole and len(block_rows([block])) == 3
    blocks = list_blocks(found(tmp_path / "f.arrow"), 100)
    assert len(block_rows(blocks)) == 3


@pytest.mark.parametrize("make", [containers.jsonl, containers.parquet, containers.arrow])
def test_a_file_without_rows_has_no_rows_in_its_blocks(tmp_path: Path, make: Callable[[Any], bytes]) -> None:
    ending = make.__name__
    path = written(tmp_path / f"a.{ending}", make([]))
    assert block_rows(list_blocks(found(path), 100)) == [] == read(path)


def test_a_data_set_has_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(hub, "load", lambda *_: saved)
    file = SourceFile(0, "dataset x (train)", "dataset", None, "x", None, "train")
    blocks = list_blocks(file, 400)
    assert len(blocks) > 2 and block_rows(blocks) == ROWS
    assert [value for _, value in decoded(list(read_chunks(file, 400)))] == ROWS


def test_blocks_of_a_gzip_would_be_wrong_and_are_not_made(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", gzip.compress(containers.jsonl(ROWS)))
    [block] = list_blocks(found(path), 100)
    assert block.whole and len(block_rows([block])) == len(ROWS)


def test_a_text_that_all_rows_of_a_parquet_file_share_does_not_fill_the_memory(tmp_path: Path) -> None:
    rows = 3000
    shared = pa.array(["system " * 2000]).take(pa.array([0] * rows))  # 14 KB, stored once
    pa.parquet.write_table(pa.table({"text": shared}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    [block] = list_blocks(found(tmp_path / "a.parquet"), 1 << 18)
    for chunks in (read_chunks(found(tmp_path / "a.parquet"), 1 << 18), read_block(block, 1 << 18)):
        before = pa.total_allocated_bytes()
        count, most = 0, 0
        for chunk in chunks:
            most = max(most, pa.total_allocated_bytes() - before)
            count += len(list(rows_of(chunk)))
        assert count == rows and most < 8 << 20
