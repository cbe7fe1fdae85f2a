"""A store is whole or it is none; reading it copies nothing."""

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest

from bigtune.data.document import Document
from bigtune.data.manifest import MANIFEST, VERSION, PartCounts, read_manifest
from bigtune.data.store import PARTS, Store, read_part_counts, write_part
from bigtune.errors import DataError
from tests.stores import batch_of, document, make_store


def documents(*lengths: int) -> list[Document]:
    return [document([10 * n + i for i in range(n)], (1, 2), (n - 1, n), weights=[1, 0.5]) for n in lengths]


def same(one: Document, other: Document) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in ((one.input_ids, other.input_ids), (one.spans, other.spans), (one.weights, other.weights))
    )


def test_documents_of_all_parts_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = documents(3, 5, 4, 7, 6)
    store = make_store(tmp_path / "s", written, parts=3)
    assert store.lengths.dtype == np.int32 and store.lengths.tolist() == [3, 5, 4, 7, 6]
    assert store.supervised.tolist() == [2] * 5
    assert all(same(store.document(i), expected) for i, expected in enumerate(written))
    assert not store.document(0).input_ids.flags.owndata and not store.document(0).input_ids.flags.writeable
    assert (len(store), store.where(3)) == (5, "0.jsonl, row 4")
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            store.document(outside)


def test_only_what_was_chosen_is_there_and_each_knows_its_source(tmp_path: Path) -> None:
    first, second = documents(3, 5, 4), documents(7, 6)
    store = make_store(tmp_path / "s", first, second, parts=2, chosen=[1, 2, 4])
    assert store.lengths.tolist() == [5, 4, 6]
    assert store.sources.tolist() == [0, 0, 1] and store.content.tolist() == [2, 3, 5]
    assert same(store.document(2), second[1]) and store.where(2) == "1.jsonl, row 2"


def test_a_piece_keeps_what_can_be_learnt_in_it() -> None:
    whole = document(range(10), (1, 4), (5, 9), weights=[1, 2])
    piece = whole.piece(2, 5)
    assert piece.input_ids.tolist() == [2, 3, 4, 5, 6]
    assert piece.spans.tolist() == [[1, 2], [3, 5]] and piece.weights.tolist() == [1, 2]  # nothing predicts the first
    assert whole.piece(3, 2).spans.tolist() == []


def test_the_datasets_library_reads_the_folder(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", documents(3, 5, 4), parts=2)
    loaded = datasets.load_from_disk(str(tmp_path / "s")).select(store.chosen)
    assert loaded["input_ids"][1] == store.document(1).input_ids.tolist()
    assert loaded.cache_files and "row" in loaded.column_names  # mapped, not read into memory


def test_a_part_without_its_counts_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a-00000"
    counts = PartCounts(rows=3, bad=[(2, "broken JSON", "why")])
    written = write_part(path, batch_of(documents(3)), counts)
    assert read_part_counts(path) == written
    assert written == dataclasses.replace(counts, bytes=path.with_suffix(".arrow").stat().st_size)
    path.with_suffix(".json").write_text("{")
    assert read_part_counts(path) is None
    path.with_suffix(".json").unlink()
    assert read_part_counts(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["a-00000.arrow"]


def test_parts_that_the_manifest_does_not_name_are_removed(tmp_path: Path) -> None:
    parts = tmp_path / "s" / PARTS
    parts.mkdir(parents=True)
    write_part(parts / "old-00000", batch_of(documents(3)), PartCounts())
    (parts / "killed.123.tmp").write_text("half")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    store = make_store(tmp_path / "s", documents(4))
    assert sorted(file.name for file in (tmp_path / "s" / PARTS).iterdir()) == ["0-00000.arrow", "0-00000.json"]
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine" and len(store) == 1


def test_what_is_no_whole_store_says_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared documents here; run `bigtune prepare RUN.yaml`"):
        Store.open(tmp_path / "s")
    make_store(tmp_path / "s", documents(3))
    part = tmp_path / "s" / PARTS / "0-00000.arrow"
    whole = part.read_bytes()
    for broken in (whole[:-60], b"\0" * len(whole), b""):
        part.write_bytes(broken)
        with pytest.raises(DataError, match=r"0-00000.arrow: cannot be read .*run `bigtune prepare"):
            Store.open(tmp_path / "s")
    part.write_bytes(whole)
    (tmp_path / "s" / "chosen.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"chosen.npy: cannot be read"):
        Store.open(tmp_path / "s")
    listing = tmp_path / "s" / MANIFEST
    listing.write_text(listing.read_text().replace(f'"version": {VERSION}', '"version": 1'))
    with pytest.raises(DataError, match=r"another version"):
        Store.open(tmp_path / "s")
    listing.write_text("{")
    with pytest.raises(DataError, match=r"cannot be read"):
        Store.open(tmp_path / "s")


def test_the_summary_names_what_was_left_out(tmp_path: Path) -> None:
    make_store(tmp_path / "s", documents(3, 5))
    manifest = dataclasses.replace(
        read_manifest(tmp_path / "s"), removed={"near duplicate": 2}, skipped={"broken JSON": 1}, held_out=3
    )
    summary = manifest.summary()
    assert summary.startswith("2 documents of 2 rows, 8 tokens, 100.0% supervised (longest 5)")
    for told in ("removed 2 rows (near duplicate)", "skipped 1 bad rows (broken JSON)", "held out 3 rows"):
        assert told in summary
