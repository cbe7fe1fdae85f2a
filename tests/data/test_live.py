"""A stream of raw files has each document once an epoch, in an order that nothing but the seed decides."""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from bigtune.config import Data, TrainingSource
from bigtune.data import live
from bigtune.data.files import Block
from bigtune.data.live import LiveRows
from bigtune.data.pool import open_pool
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Position, Row
from bigtune.data.sources import SourceFile
from bigtune.data.window import Spec, Window, make_window
from bigtune.errors import BigtuneError, DataError


def texts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"Number {i}?", "answer": f"It is {i}. " + "four " * (i % 23)} for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 2,999 in files of four kinds, two of which are read from their start alone."""
    path = tmp_path_factory.mktemp("raw")
    lines = "".join(json.dumps(row) + "\n" for row in texts(1200))
    (path / "a.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(texts(800, 1200)), path / "b.parquet", row_group_size=50)
    (path / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in texts(600, 2000)).encode()))
    (path / "d.json").write_text(json.dumps(texts(400, 2600)))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows of a few dozen rows, so that little data has many of them; all in this process."""
    monkeypatch.setattr(live, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(live, "WINDOW_BYTES", 8192)
    monkeypatch.setattr(live, "ROWS_A_WINDOW", 1)
    opened = open_pool
    monkeypatch.setattr(live, "open_pool", lambda workers, recipe: opened(0, recipe))


def stream(folder: Path, model_path: Path, seed: int = 3, **settings: Any) -> LiveRows:
    settings = {"sequence_length": 128, **settings}
    data = Data(sources=(TrainingSource(path=folder),), stream=True, **settings)
    recipe = dataclasses.replace(_recipe(model_path), sources=data.sources, clean=data.clean)
    return LiveRows(data, recipe, seed)


@functools.cache
def _recipe(model_path: Path) -> Recipe:
    return Recipe.of(Data(sources=(TrainingSource(path=model_path),)), model_path, ())


def contents(row: Row) -> list[Any]:
    documents = [(d.input_ids.tolist(), d.spans.tolist(), d.weights.tolist()) for d in row.documents]
    return [row.indices, row.places, documents]


def check(rows: LiveRows) -> None:
    """As a run does before it starts."""
    rows.require_supervised(rows.first_window())


def epoch_of(rows: LiveRows, start: Position, epoch: int = 0) -> Iterator[tuple[Position, tuple[int, ...]]]:
    """Positions and documents of the rows from `start` to the end of an epoch."""
    position = start
    while True:
        [row], after = rows.take(position, 1)
        if after.epoch > epoch:
            return
        yield after, row.indices
        position = after


def test_each_document_once_an_epoch_and_another_order_in_the_next(folder: Path, model_path: Path) -> None:
    rows = stream(folder, model_path)
    first = [index for _, indices in epoch_of(rows, Position()) for index in indices]
    assert len(first) == len(set(first)) == 3000
    second = [index for _, indices in epoch_of(rows, Position(1), 1) for index in indices]
    assert set(second) == set(first) and second != first
    assert first != [i for _, ids in epoch_of(stream(folder, model_path, seed=4), Position()) for i in ids]


def test_the_words_of_every_row_are_there(folder: Path, model_path: Path, tokenizer: Any) -> None:
    rows = stream(folder, model_path)
    said: Counter[str] = Counter()
    position = Position()
    while True:
        taken, position = rows.take(position, 1)
        if position.epoch:
            break
        said.update(tokenizer.decode(document.input_ids.tolist()) for document in taken[0].documents)
    expected = [f"### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}<|end|>" for row in texts(3000)]
    assert said == Counter(expected)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_stream_goes_on_from_any_position_as_if_never_stopped(folder: Path, model_path: Path, count: int) -> None:
    whole = list(epoch_of(stream(folder, model_path), Position()))
    for at in range(0, len(whole) - count, len(whole) // 7):
        position = Position.from_json(json.loads(json.dumps(whole[at][0].to_json())))
        rows, _ = stream(folder, model_path).take(position, count)
        assert [row.indices for row in rows] == [indices for _, indices in whole[at + 1 : at + 1 + count]]


def test_going_on_makes_one_window_again_and_reads_no_other(
    folder: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(epoch_of(stream(folder, model_path), Position()))
    position = next(position for position, _ in whole if position.window == 2 and position.row)
    made: list[Position] = []

    def counted(recipe: Any, spec: Any, items: Any, place: Position) -> Any:
        made.append(place)
        return make_window(recipe, spec, items, place)

    monkeypatch.setattr(live, "make_window", counted)
    rows = stream(folder, model_path, workers=1)
    rows.take(position, 1)
    assert made[0] == Position(position.epoch, 0, position.shard, position.window)
    assert len(made) == 1 + 2  # two are made ahead


def test_worker_processes_give_the_same_rows(folder: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = stream(folder, model_path)
    expected, _ = here.take(Position(), 40)
    monkeypatch.undo()
    monkeypatch.setattr(live, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(live, "WINDOW_BYTES", 8192)
    monkeypatch.setattr(live, "ROWS_A_WINDOW", 1)
    there = stream(folder, model_path, workers=2)
    try:
        rows, _ = there.take(Position(), 40)
    finally:
        there.close()
    assert [contents(row) for row in rows] == [contents(row) for row in expected]


def test_long_documents_are_split_and_counted(folder: Path, model_path: Path) -> None:
    def tokens(rows: LiveRows) -> int:
        total, position = 0, Position()
        while True:
            taken, position = rows.take(position, 1)
            if position.epoch:
                return total
            total += sum(row.supervised for row in taken)

    dropping = stream(folder, model_path, sequence_length=40)
    splitting = stream(folder, model_path, sequence_length=40, on_long_document="split")
    whole = stream(folder, model_path)
    assert tokens(dropping) < tokens(splitting) == tokens(whole)
    assert "documents longer than 40 tokens" in dropping.losses() and not splitting.losses()


def test_bad_rows_are_named_or_counted(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(50)) + '{"frage": 1}\n')
    with pytest.raises(DataError, match=r"a.jsonl \(from byte [\d,]+ on\), row \d+: unknown format .*on_bad_row: skip"):
        stream(tmp_path, model_path).take(Position(), 30)
    rows = stream(tmp_path, model_path, on_bad_row="skip")
    list(epoch_of(rows, Position()))
    assert rows.lost["unknown format"] >= 1 and "unknown format" in rows.losses()


def test_held_out_rows_and_rows_by_themselves_are_left_out(folder: Path, model_path: Path) -> None:
    rows = stream(folder, model_path, holdout=0.25, clean={"min_answer_characters": 20})
    kept = [index for _, indices in epoch_of(rows, Position()) for index in indices]
    assert 1500 < len(kept) < 2400
    assert rows.lost["held out"] > 500 and rows.lost["answers of fewer than 20 characters"] > 50


def test_sources_with_nothing_to_learn_are_refused(tmp_path: Path, model_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No", "train": False}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    with pytest.raises(DataError, match=r"nothing to train on in a whole epoch \(.*nothing supervised"):
        stream(tmp_path, model_path).take(Position(), 1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "four " * 40, "answer": "4"}) + "\n")
    with pytest.raises(DataError, match=r"are supervised, less than data.min_supervised"):
        check(stream(tmp_path, model_path, min_supervised=0.5))


def test_every_row_is_in_a_document_or_counted(tmp_path: Path, model_path: Path) -> None:
    masked = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No", "train": False}]}
    rows = [*texts(200), *[masked] * 20, *[{"a": 1}] * 30, *({"question": f"{i}", "answer": "x"} for i in range(50))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    live_rows = stream(tmp_path, model_path, **KEPT)
    documents = [index for _, indices in epoch_of(live_rows, Position()) for index in indices]
    assert len(documents) == len(set(documents)) and 100 < len(documents) < 200
    # The last take has opened the next epoch's first window, so each reason is counted in whole by a run of its own.
    lost: Counter[str] = Counter()
    for _, window in _windows(stream(tmp_path, model_path, **KEPT)):
        lost.update(window.lost)
    assert lost["unknown format"] == 30 and len(documents) + sum(lost.values()) == len(rows)
    assert all(lost[reason] for reason in ("held out", "nothing supervised", "answers of fewer than 3 characters"))


KEPT: dict[str, Any] = {"on_bad_row": "skip", "holdout": 0.3, "clean": {"min_answer_characters": 3}}


def _windows(rows: LiveRows) -> Iterator[tuple[Position, Window]]:
    """All windows of an epoch that have rows."""
    for place, window in rows._made_windows(Position()):
        if place.epoch:
            return
        yield place, window


def test_an_unreadable_file_is_named_or_counted_once(folder: Path, tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    (tmp_path / "cut.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-30])
    (tmp_path / "cut.jsonl.gz").write_bytes((folder / "c.jsonl.gz").read_bytes()[:-30])
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    rows = stream(tmp_path, model_path, on_bad_row="skip")
    taken = list(epoch_of(rows, Position()))
    list(epoch_of(rows, taken[-1][0], epoch=1))
    assert "3 × unreadable file" in rows.losses() and len({i for _, indices in taken for i in indices}) >= 1200
    for name in ("cut.parquet", "cut.jsonl.gz", "gone.jsonl"):
        alone = tmp_path / f"{name} alone"
        alone.mkdir()
        (tmp_path / name).rename(alone / name)
        with pytest.raises(DataError, match=f"{name}: "):
            list(epoch_of(stream(alone, model_path), Position()))


def test_the_order_of_a_stream_stays_as_it_is() -> None:
    """Positions in checkpoints mean rows: who changes the order on purpose raises the manifest's VERSION as well."""
    rows = LiveRows.__new__(LiveRows)
    file = SourceFile(0, "a.jsonl", "jsonl")
    rows._blocks = [Block(file, i, 100 * i, 100 * i + 100, 100) for i in range(40)]
    rows._large, rows._stats, rows.shards, rows._window_bytes = [], {file: None}, 3, 500
    rows._spec = Spec(Data(sources=(TrainingSource(path=Path("a")),)), 0, seed=11)
    seen: list[list[Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "stat_of", lambda file: None)
        for place, items in rows._window_items(Position()):
            seen.append([place.epoch, place.shard, place.window, [item.block.index for item in items]])
            if place.epoch == 2:
                break
    assert [len(items) for epoch, shard, _, items in seen if (epoch, shard) == (0, 0)] == [5, 5, 4]
    assert sorted(i for epoch, *_, items in seen if not epoch for i in items) == list(range(40))
    assert hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16] == "4cc2bb16063cc934"


def test_a_large_source_with_nothing_to_learn_is_not_read_to_its_end(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No", "train": False}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3000)
    monkeypatch.setattr(live, "EMPTY_AT_FIRST", 4)
    rows = stream(tmp_path, model_path)
    with pytest.raises(DataError, match=r"nothing to train on in the first 4 windows \([\d,]+ × nothing supervised"):
        check(rows)
    assert 100 < rows.lost["nothing supervised"] < 1000


def test_a_row_knows_the_places_of_its_documents(tmp_path: Path, model_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(300)))
    rows, _ = stream(tmp_path, model_path).take(Position(), 40)
    raw, tokenizer = path.read_bytes(), Tokenizer.from_str(_recipe(model_path).chat.tokenizer_json)
    checked = 0
    for row in rows:
        for place, document in zip(row.places, row.documents, strict=True):
            found = re.fullmatch(rf"{re.escape(str(path))} \(from byte ([\d,]+) on\), row (\d+)", place)
            assert found, place
            begin, number = int(found[1].replace(",", "")), int(found[2])
            first = raw.rindex(b"\n", 0, begin) + 1 if begin else 0  # of the line that the byte lies in
            lines = raw[first:].splitlines()[first < begin :]
            assert json.loads(lines[number - 1])["question"] in tokenizer.decode(document.input_ids.tolist())
            checked += 1
    assert checked > 100


def test_a_file_that_changes_is_noticed(tmp_path: Path, model_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(400)))
    rows = stream(tmp_path, model_path)
    rows.take(Position(), 1)
    before = rows.fingerprint
    with path.open("a") as file:
        file.write(json.dumps(texts(1)[0]) + "\n")
    with pytest.raises(DataError, match=r"a.jsonl: changed since the run started"):
        rows.take(Position(1), 1)
    assert stream(tmp_path, model_path).fingerprint != before


def test_a_moved_file_has_the_same_fingerprint(tmp_path: Path, model_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(40)))
    os.utime(tmp_path / "two" / "a.jsonl", (1, 1))
    one, two = (stream(tmp_path / name, model_path) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert stream(tmp_path / "one", model_path, on_long_document="split").fingerprint != one.fingerprint


def lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_empty_sources_are_one_line(tmp_path: Path, model_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [])
    with pytest.raises(BigtuneError, match="nothing to train on in a whole epoch"):
        stream(tmp_path, model_path).take(Position(), 1)
