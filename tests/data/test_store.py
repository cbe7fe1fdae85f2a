"""A store is whole or it is none; reading it copies nothing."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bigtune.data.chat import Encoded
from bigtune.data.conversation import Conversation
from bigtune.data.store import Manifest, Store, StoreWriter
from bigtune.errors import DataError


def documents(lengths: list[int]) -> list[Encoded]:
    return [Encoded(np.arange(n, dtype=np.int32) + 10 * n, np.array([[1, 2], [n - 1, n]], np.int32)) for n in lengths]


def rows(count: int) -> list[Conversation]:
    return [Conversation((), Path("a.jsonl"), i + 1, text="x") for i in range(count)]


def manifest(count: int) -> Manifest:
    return Manifest("print", "inputs", 64, count, count, count, 10, 5, 9, 0, dropped={"longer than 64 tokens": 2})


def write(path: Path, *batches: list[int]) -> None:
    with StoreWriter(path) as writer:
        for lengths in batches:
            writer.add(documents(lengths), rows(len(lengths)))
        writer.finish(manifest(sum(map(len, batches))))


def test_documents_come_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "store", [3, 5], [4])
    store = Store.open(tmp_path / "store")
    assert store.lengths.dtype == np.int32 and store.lengths.tolist() == [3, 5, 4]
    for i, expected in enumerate(documents([3, 5, 4])):
        document = store.document(i)
        assert document.input_ids.tolist() == expected.input_ids.tolist()
        assert document.spans.tolist() == expected.spans.tolist()
        assert not document.input_ids.flags.owndata and not document.input_ids.flags.writeable
    assert (len(store), store.fingerprint, store.where(2)) == (3, "print", "a.jsonl, row 1")
    with pytest.raises(IndexError):
        store.document(3)


def test_the_arrow_file_is_a_plain_stream_for_other_tools(tmp_path: Path) -> None:
    write(tmp_path, [3, 5])
    with pa.memory_map(str(tmp_path / "documents.arrow")) as source:
        table = pa.ipc.open_stream(source).read_all()
    assert table.column_names == ["input_ids", "spans", "source", "row"]
    assert table.column("row").to_pylist() == [1, 2]


def test_a_writer_that_fails_leaves_the_old_store(tmp_path: Path) -> None:
    write(tmp_path, [3])
    with pytest.raises(RuntimeError), StoreWriter(tmp_path) as writer:
        writer.add(documents([4, 4]), rows(2))
        raise RuntimeError
    assert Store.open(tmp_path).lengths.tolist() == [3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["documents.arrow", "manifest.json"]


def test_a_new_store_replaces_the_old_one_and_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, [3])
    before = Store.open(tmp_path)
    write(tmp_path, [4, 4])
    assert Store.open(tmp_path).lengths.tolist() == [4, 4]
    assert before.document(0).input_ids.tolist() == [30, 31, 32]  # a reader keeps what it opened
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_no_whole_store_says_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared documents here; run `bigtune prepare RUN.yaml`"):
        Store.open(tmp_path)
    write(tmp_path, [3])
    arrow, listing = tmp_path / "documents.arrow", tmp_path / "manifest.json"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"bytes, where the manifest has .* run `bigtune prepare"):
        Store.open(tmp_path)
    arrow.write_bytes(b"\0" * len(whole))
    with pytest.raises(DataError, match=r"run `bigtune prepare"):
        Store.open(tmp_path)
    listing.write_text(listing.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(DataError, match=r"another version"):
        Store.open(tmp_path)
    listing.write_text("{")
    with pytest.raises(DataError, match=r"cannot be read"):
        Store.open(tmp_path)


def test_the_summary_names_what_was_left_out() -> None:
    summary = manifest(1234).summary()
    assert summary.startswith("1,234 documents, 10 tokens, 50.0% supervised")
    assert "dropped 2 (longer than 64 tokens)" in summary
