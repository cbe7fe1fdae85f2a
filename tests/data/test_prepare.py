"""`bigtune prepare` never does the same work twice, counts what it leaves out, and says what is wrong."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtune.config import Clean, Data, Source, TrainingSource
from bigtune.data import inputs, recipe
from bigtune.data import prepare as room
from bigtune.data.chat import ChatFormat, load_tokenizer
from bigtune.data.formats import read_conversations
from bigtune.data.holdout import bound
from bigtune.data.manifest import Manifest
from bigtune.data.parts import make_part
from bigtune.data.prepare import prepare
from bigtune.data.store import PARTS, REMOVED, Store
from bigtune.errors import DataError, ModelError
from tests.disk import resize, small_disk

WriteRows = Callable[[Iterable[Mapping[str, Any]]], Path]


def qa(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


SHORT = [qa("Hi", "Hello"), qa("And?", "The sky is blue.")]
LONG = qa("Hi", "four " * 200)


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [qa(f"Number {i}?", f"{i} is {i % 7} times something." * (1 + i % 3)) for i in range(start, start + count)]


def data(*paths: Path, **settings: Any) -> Data:
    sources = tuple(TrainingSource(path=path) for path in paths)
    return Data(sources=sources, sequence_length=settings.pop("sequence_length", 128), **settings)


def removed(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / REMOVED).read_text().splitlines()]


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(store: Path) -> dict[str, str]:
    """A hash of each file of a store but for the times in its manifest."""
    hashes = {}
    for path in sorted(store.rglob("*")):
        if path.is_file():
            text = path.read_bytes()
            if path.name == "manifest.json":
                tree = json.loads(text)
                for file in tree["files"]:
                    file["stat"] = None
                text = json.dumps(tree).encode()
            hashes[str(path.relative_to(store))] = hashlib.sha256(text).hexdigest()
    return hashes


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of parts, as they are made in this process."""
    made: list[str] = []
    make = make_part

    def counted(recipe: Any, chunk: Any, path: Path) -> Any:
        made.append(path.name)
        return make(recipe, chunk, path)

    monkeypatch.setattr(room, "make_part", counted)
    return made


def test_documents_are_stored_and_counted(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    manifest = prepare(data(write_rows(SHORT)), model_path, tmp_path / "s", lambda *call: calls.append(call))
    store = Store.open(tmp_path / "s")
    assert store.manifest == manifest and manifest.template == "plain"
    assert (manifest.rows, manifest.documents) == (2, 2)
    assert manifest.tokens == store.lengths.sum()
    spans = [store.document(i).spans for i in range(2)]
    assert manifest.supervised_tokens == sum(int((span[:, 1] - span[:, 0]).sum()) for span in spans)
    assert calls == [(2, None)]


def test_the_same_inputs_are_prepared_once_and_without_transformers(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    rows = write_rows(SHORT)
    first = prepare(data(rows), model_path, tmp_path / "s")
    code = (
        "import sys; from pathlib import Path; from bigtune.config import Data, TrainingSource;"
        "from bigtune.data.prepare import prepare;"
        f"d = Data(sources=(TrainingSource(path=Path({str(rows)!r})),), sequence_length=128);"
        f"m = prepare(d, Path({str(model_path)!r}), Path({str(tmp_path / 's')!r}));"
        "assert not {'transformers', 'torch', 'datasets', 'loky'} & set(sys.modules); print(m.fingerprint)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == first.fingerprint


def test_an_unchanged_file_is_not_even_read_again(
    write_rows: WriteRows, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(SHORT)
    old = time.time() - 60
    os.utime(rows, (old, old))
    first = prepare(data(rows), model_path, tmp_path / "s")
    monkeypatch.setattr(inputs, "hash_of", lambda file: pytest.fail("it was read"))
    assert prepare(data(rows), model_path, tmp_path / "s") == first
    monkeypatch.undo()
    # The same size, and a time that differs: its contents decide.
    rows.write_text(rows.read_text().replace("Hello", "Howdy"))
    assert prepare(data(rows), model_path, tmp_path / "s").fingerprint != first.fingerprint


def test_a_file_that_changed_a_moment_ago_is_read_again(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    rows = write_rows(SHORT)
    first = prepare(data(rows), model_path, tmp_path / "s")
    before = rows.stat()
    rows.write_text(rows.read_text().replace("Hello", "Howdy"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))  # within one tick of a coarse clock
    assert prepare(data(rows), model_path, tmp_path / "s").fingerprint != first.fingerprint


def test_a_change_of_rows_template_or_supervision_prepares_anew(
    write_rows: WriteRows, model_path: Path, chatml: Any, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    first = prepare(data(write_rows(SHORT)), model_path, tmp_path / "s")
    more = prepare(data(write_rows([*SHORT, qa("1", "2")])), model_path, tmp_path / "s")
    named = prepare(data(write_rows(SHORT), chat_template="raw"), model_path, tmp_path / "s")
    own = prepare(data(write_rows(SHORT), chat_template=str(tmp_path / "t.jinja")), model_path, tmp_path / "s")
    users = prepare(data(write_rows(SHORT), supervise=["user"]), model_path, tmp_path / "s")
    chatml.save_pretrained(tmp_path / "chatml")
    other = prepare(data(write_rows(SHORT)), tmp_path / "chatml", tmp_path / "s")
    assert len({made.fingerprint for made in (first, more, named, own, users, other)}) == 6
    assert (more.documents, named.template, other.template) == (3, "raw", "model")
    assert own.template_text.startswith("{% for m in messages %}")


def test_a_new_file_costs_its_own_work_alone(model_path: Path, tmp_path: Path, work: list[str]) -> None:
    first, second = written(tmp_path / "a.jsonl", many(50)), written(tmp_path / "b.jsonl", many(50, 50))
    prepare(data(first), model_path, tmp_path / "s")
    before = list(work)
    together = prepare(data(first, second), model_path, tmp_path / "s")
    assert together.documents == 100 and len(work) == len(before) + 1
    moved = tmp_path / "moved.jsonl"
    first.rename(moved)
    assert prepare(data(moved, second), model_path, tmp_path / "s").fingerprint == together.fingerprint
    assert len(work) == len(before) + 1
    prepare(data(second), model_path, tmp_path / "s")
    assert len(list((tmp_path / "s" / PARTS).glob("*.arrow"))) == 1  # what no one needs is gone


@pytest.mark.parametrize("share", [0.4, 0.97, 1], ids=["parts", "last part", "manifest"])
def test_a_full_disk_leaves_no_store(write_rows: WriteRows, model_path: Path, tmp_path: Path, share: float) -> None:
    rows = write_rows(many(3000))
    prepare(data(rows), model_path, tmp_path / "large")
    size = sum(file.stat().st_size for file in (tmp_path / "large").rglob("*") if file.is_file())
    with small_disk(tmp_path / "disk") as disk:
        resize(disk, int(share * size) // 4096 * 4096)
        with pytest.raises(DataError) as raised:
            prepare(data(rows), model_path, disk / "s")
        assert "cannot be written here (No space left on device); set data.store" in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(DataError, match="no prepared documents"):
            Store.open(disk / "s")
        resize(disk, "8m")
        assert prepare(data(rows), model_path, disk / "s").documents == 3000
        assert contents(disk / "s") == contents(tmp_path / "large")


def test_a_sequence_length_changes_no_document(
    write_rows: WriteRows, model_path: Path, tmp_path: Path, work: list[str]
) -> None:
    rows = write_rows([*SHORT, LONG])
    made = [prepare(data(rows, sequence_length=n), model_path, tmp_path / "s") for n in (128, 100, 2048)]
    assert len({manifest.fingerprint for manifest in made}) == 1 and len(work) == 1
    assert made[0].documents == 3


def test_bad_rows_are_named_then_skipped_and_finished_work_is_kept(
    model_path: Path, tmp_path: Path, work: list[str]
) -> None:
    good = written(tmp_path / "a.jsonl", SHORT)
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"question": "Hi", "answer": "Hello"}\n{"question": 4\n{"frage": "?"}\n')
    with pytest.raises(DataError, match=rf"^{bad}, row 2: broken JSON .*; mend the row, or set data.on_bad_row: skip$"):
        prepare(data(good, bad), model_path, tmp_path / "s")
    made = prepare(data(good, bad, on_bad_row="skip"), model_path, tmp_path / "s")
    assert len(work) == 2
    assert made.skipped == {"broken JSON": 1, "unknown format": 1} and made.documents == 3
    assert [(row["file"], row["row"]) for row in removed(tmp_path / "s")] == [(str(bad), 2), (str(bad), 3)]
    assert "skipped 1 bad rows (broken JSON)" in made.summary()


def test_rows_that_the_template_refuses_are_bad_rows(
    write_rows: WriteRows, make_tokenizer: Callable[..., Any], chatml: Any, tmp_path: Path
) -> None:
    strict = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    make_tokenizer(strict + chatml.chat_template).save_pretrained(tmp_path / "m")
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]
    refused = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = write_rows([*SHORT, refused])
    with pytest.raises(DataError, match=r"row 3: the chat template refuses .*no system") as caught:
        prepare(data(rows), tmp_path / "m", tmp_path / "s")
    assert str(caught.value).count("row 3") == 1
    made = prepare(data(rows, on_bad_row="skip"), tmp_path / "m", tmp_path / "s")
    assert made.documents == 2 and made.skipped == {"refused by the chat template": 1}


def test_an_unreadable_file_is_named_or_counted(model_path: Path, tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", SHORT)
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in many(200)).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b.jsonl.gz: "):
        prepare(data(tmp_path / "*.jsonl*"), model_path, tmp_path / "s")
    made = prepare(data(tmp_path / "*.jsonl*", on_bad_row="skip"), model_path, tmp_path / "s")
    assert made.skipped == {"unreadable file": 1} and made.documents >= 2
    assert [row["reason"] for row in removed(tmp_path / "s")] == ["unreadable file"]


def test_nothing_or_next_to_nothing_to_train_on_is_an_error(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nothing to train on is left of 0 rows .*the files are empty"):
        prepare(data(write_rows([])), model_path, tmp_path / "s")
    with pytest.raises(DataError, match=r"1 × unknown format"):
        prepare(data(write_rows([{"a": 1}]), on_bad_row="skip"), model_path, tmp_path / "s")
    masked = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No.", "train": False}]}
    ]
    with pytest.raises(DataError, match=r"nothing to train on is left of 3 rows \(3 × nothing supervised\)"):
        prepare(data(write_rows(masked * 3)), model_path, tmp_path / "s")
    little = [qa("four " * 3000, "4")]
    with pytest.raises(DataError, match=r"only 2 of [\d,]+ tokens \(0\.\d+%\) are supervised, less than data.min_sup"):
        prepare(data(write_rows(little)), model_path, tmp_path / "s")
    assert prepare(data(write_rows(little), min_supervised=0.0), model_path, tmp_path / "s").documents == 1


def test_rows_that_are_masked_away_count_among_what_is_not_supervised(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    masked = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No.", "train": False}]}
    rows = write_rows([*[masked] * 5000, qa("Hi", "Hello")])
    with pytest.raises(
        DataError, match=r"only \d of [\d,]{6,} tokens \(0\.\d+%\) are supervised, less than data.min_sup"
    ):
        prepare(data(rows), model_path, tmp_path / "s")
    assert prepare(data(rows, min_supervised=0.0), model_path, tmp_path / "s").removed == {"nothing supervised": 5000}


@pytest.mark.parametrize("loss", ["a part", "half a part", "its counts", "the choice", "the list of what is left out"])
def test_a_store_that_lost_a_file_is_made_whole(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str], loss: str
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", (1024, 1024))
    path, store = written(tmp_path / "a.jsonl", many(60)), tmp_path / "s"
    prepare(data(path), model_path, store)
    before, made = contents(store), len(work)
    part = sorted((store / PARTS).glob("*.arrow"))[1]
    lost = {"a part": part, "its counts": part.with_suffix(".json"), "the choice": store / "chosen.npy"}
    if loss == "half a part":
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    else:
        lost.get(loss, store / REMOVED).unlink()
    assert prepare(data(path), model_path, store).documents == len(Store.open(store)) == 60
    if loss != "its counts":  # which nothing needs but a call that goes on
        assert contents(store) == before
    assert len(work) - made == ("part" in loss)


def test_rows_that_were_skipped_are_an_error_once_they_may_not_be(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    rows = write_rows([*SHORT, {"a": 1}])
    made = prepare(data(rows, on_bad_row="skip"), model_path, tmp_path / "s", keep="another")
    for keep in (None, made.fingerprint):
        with pytest.raises(DataError, match=r"rows.jsonl, row 3: unknown format"):
            prepare(data(rows), model_path, tmp_path / "s", keep=keep)


def test_a_number_of_held_out_rows_is_the_same_to_decontamination(model_path: Path, tmp_path: Path) -> None:
    picky = tmp_path / "picky.jinja"
    picky.write_text(
        "{% for m in messages %}{% if 'odd' in m.content %}{{ raise_exception('odd') }}{% endif %}"
        "{{ m.role + ' ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    rows = [qa(f"{'odd' if i % 2 else 'even'}: {i}?", f"It is {i}.") for i in range(80)]
    path = written(tmp_path / "a.jsonl", rows)
    settings = {"chat_template": str(picky), "on_bad_row": "skip", "clean": Clean(decontaminate=5), "holdout": 10}
    made = prepare(data(path, **settings), model_path, tmp_path / "s")
    assert made.held_out == 10 and made.skipped == {"refused by the chat template": 40}
    chat = ChatFormat.of(load_tokenizer(model_path), str(picky))
    assert recipe.held_out_below(data(path, **settings), chat) == made.held_out_below
    every = [row.content_hash for row in read_conversations(data(path).sources, "error")]
    assert bound(10, np.array(every, np.uint64)) < made.held_out_below  # refused rows would take places of others


def test_held_out_rows_stay_the_same_when_rows_are_added(model_path: Path, tmp_path: Path) -> None:
    def held_out(count: int, holdout: float | int) -> set[str]:
        path = written(tmp_path / "a.jsonl", reversed(many(count)) if count % 2 else many(count))
        made = prepare(data(path, holdout=holdout), model_path, tmp_path / "s")
        assert made.documents + made.held_out == count
        from bigtune.data.holdout import held_out_rows

        return {row.messages[0].content for row in held_out_rows(data(path), made.held_out_below)}

    few, more = held_out(400, 0.1), held_out(601, 0.1)
    assert 20 < len(few) < 60 and few < more and len(more - few) < 40
    ten, still = held_out(400, 10), held_out(411, 10)
    assert len(ten) == len(still) == 10 and len(ten & still) >= 8


def test_the_same_row_is_never_on_both_sides(model_path: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", many(100) * 2)
    made = prepare(data(path, holdout=0.2), model_path, tmp_path / "s")
    assert made.held_out % 2 == 0 and made.held_out > 0


def test_cleaning_is_counted_listed_and_costs_no_new_tokens(model_path: Path, tmp_path: Path, work: list[str]) -> None:
    path = written(tmp_path / "a.jsonl", [*many(60), *many(5), qa("Why?", "because " * 60), qa("Hi", "ok")])
    whole = prepare(data(path), model_path, tmp_path / "s")
    clean = Clean(exact_duplicates=True, max_repetition=0.5, same_answer_at_most=1)
    made = prepare(data(path, clean=clean), model_path, tmp_path / "s")
    assert whole.documents == 67 and made.documents == 61 and len(work) == 2
    assert made.removed["exact duplicate"] == 5 and sum(made.removed.values()) == 6
    rows = removed(tmp_path / "s")
    assert [row["row"] for row in rows] == [61, 62, 63, 64, 65, 66]
    assert rows[0]["like"] == {"file": str(path), "row": 1}
    looser = clean.model_copy(update={"max_repetition": 0.999})
    assert prepare(data(path, clean=looser), model_path, tmp_path / "s").documents == 62 and len(work) == 2
    assert not {61, 62} & {Store.open(tmp_path / "s").columns.row(int(i)) for i in Store.open(tmp_path / "s").chosen}


def test_training_rows_that_overlap_held_out_rows_are_removed(model_path: Path, tmp_path: Path) -> None:
    question = "The quick brown fox jumps over the lazy dog and then runs away into the deep dark wood."
    path = written(tmp_path / "a.jsonl", [*many(10), qa(f"Read this. {question} What did it do?", "It ran.")])
    held_out = written(tmp_path / "test.jsonl", [qa(question, "It jumped.")])
    clean = Clean(decontaminate=8)
    made = prepare(data(path, clean=clean), model_path, tmp_path / "s", held_out=(Source(path=held_out),))
    assert made.removed == {"overlaps held-out rows": 1} and removed(tmp_path / "s")[0]["row"] == 11
    inside = prepare(data(path, clean=clean, holdout=0.3), model_path, tmp_path / "s")
    assert inside.held_out > 0 and "overlaps held-out rows" in inside.removed


def test_rows_with_the_same_id_are_counted(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    made = prepare(data(write_rows([qa(str(i), "a", id=i % 3) for i in range(5)])), model_path, tmp_path / "s")
    assert made.duplicate_ids == 2 and made.documents == 5
    assert "2 rows repeat the id of another" in made.summary()


def test_missing_files_are_named_before_any_work(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl"):
        prepare(data(tmp_path / "gone.jsonl"), model_path, tmp_path / "s")
    with pytest.raises(ModelError, match=r"no such model folder"):
        prepare(data(write_rows(SHORT)), tmp_path / "gone", tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data.store"):
        prepare(data(write_rows(SHORT)), model_path, tmp_path / "file" / "s")
    with pytest.raises(DataError, match=r"set data.store"):
        prepare(data(write_rows(SHORT)), model_path, tmp_path / "file")


def test_a_file_that_changes_while_it_is_read_is_refused(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = many(50)
    path = written(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(inputs, "CHUNK_BYTES", (1024, 1024))
    make = make_part

    def changing(recipe: Any, chunk: Any, part: Path) -> Any:
        if chunk.index == 0:
            written(path, [*rows[:-1], qa("late", "row")])
        return make(recipe, chunk, part)

    monkeypatch.setattr(room, "make_part", changing)
    with pytest.raises(DataError, match=r"a.jsonl: changed while it was read; run the command again"):
        prepare(data(path), model_path, tmp_path / "s")
    # What was made of it is not taken for the file that was hashed, should that come back.
    monkeypatch.undo()
    written(path, rows)
    assert prepare(data(path), model_path, tmp_path / "s").documents == 50
    prepare(data(path), model_path, tmp_path / "whole")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_documents_that_a_checkpoint_needs_are_not_replaced(model_path: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", SHORT)
    first = prepare(data(path), model_path, tmp_path / "s")
    written(path, many(3))
    with pytest.raises(DataError, match=r"a source or the tokenizer changed since this run was started.*--new-data"):
        prepare(data(path), model_path, tmp_path / "s", keep=first.fingerprint)
    assert Store.open(tmp_path / "s").fingerprint == first.fingerprint


def test_of_several_ranks_one_works(write_rows: WriteRows, model_path: Path, tmp_path: Path, work: list[str]) -> None:
    rows = write_rows(SHORT)
    made: list[Manifest] = []
    ranks = [
        threading.Thread(target=lambda: made.append(prepare(data(rows), model_path, tmp_path / "s"))) for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(work) == 1 and len(made) == 4 and len({manifest.fingerprint for manifest in made}) == 1


LARGE = 2_000
SMALL_CHUNKS = (8192, 8192)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("large") / "a.jsonl", [*many(LARGE), *many(300)])


@pytest.fixture
def large(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is cut into many chunks and goes to worker processes."""
    monkeypatch.setattr(room, "SMALL_BYTES", 0)
    monkeypatch.setattr(inputs, "CHUNK_BYTES", SMALL_CHUNKS)
    return large_file


def test_any_number_of_processes_gives_the_same_bytes(large: Path, model_path: Path, tmp_path: Path) -> None:
    clean = Clean(near_duplicates=0.9, exact_duplicates=True)
    for workers in (1, 2, 3):
        prepare(data(large, workers=workers, clean=clean), model_path, tmp_path / str(workers))
    first = contents(tmp_path / "1")
    assert first == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert sum(name.endswith(".arrow") for name in first) >= 4
    assert first != contents(tmp_path / "1" / PARTS)  # the comparison can fail


def test_a_killed_call_goes_on_where_it_ended_and_leaves_no_process(
    large: Path, model_path: Path, tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path; from bigtune.config import Data, TrainingSource;"
        "from bigtune.data import inputs, prepare as room;"
        f"room.SMALL_BYTES, inputs.CHUNK_BYTES = 0, {SMALL_CHUNKS};"
        f"d = Data(sources=(TrainingSource(path=Path({str(large)!r})),), sequence_length=128, workers=2);"
        f"room.prepare(d, Path({str(model_path)!r}), Path({str(tmp_path / 's')!r}))"
    )
    parts = tmp_path / "s" / PARTS
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while process.poll() is None and not (done := list(parts.glob("*.json"))):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for _ in range(200):  # workers end with their parent
        if not any(part.suffix == ".tmp" for part in parts.iterdir()) and not _session(process.pid):
            break
        time.sleep(0.05)
    assert not _session(process.pid)
    before = {path.name: path.stat().st_mtime_ns for path in done}
    manifest = prepare(data(large, workers=2), model_path, tmp_path / "s")
    assert manifest.documents == LARGE + 300
    assert {name: (parts / name).stat().st_mtime_ns for name in before} == before
    prepare(data(large, workers=2), model_path, tmp_path / "whole")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def _session(leader: int) -> list[int]:
    """Processes of a session that are still there."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                alive.append(int(entry.name))
    return alive


def test_a_worker_that_is_killed_is_one_line(
    large: Path, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "make_part", _die)
    with pytest.raises(DataError, match=r"a process that tokenized was killed \(out of memory\?\); lower data.workers"):
        prepare(data(large, workers=2), model_path, tmp_path / "s")


def _die(recipe: Any, chunk: Any, path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_store_is_never_written_over_other_files(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / PARTS).mkdir(parents=True)
    path = written(folder / PARTS / "train-0.jsonl", SHORT)
    with pytest.raises(DataError, match=r"train-0.jsonl: is not of a document store; choose another folder"):
        prepare(data(path), model_path, folder)
    assert path.exists()
    prepare(data(path), model_path, tmp_path / "s")  # its own files are no hindrance to the next call
    written(path, many(3))
    assert prepare(data(path), model_path, tmp_path / "s").documents == 3


def test_a_key_in_fields_that_no_row_has_is_an_error(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    path = write_rows(
        [{"instruction": "Say it", "output": "It", "context": "Here"}, {"instruction": "a", "output": "b"}]
    )

    def made(**fields: str) -> Manifest:
        source = TrainingSource(path=path, fields=fields)
        return prepare(Data(sources=(source,), sequence_length=128), model_path, tmp_path / "s")

    with pytest.raises(DataError, match=r"fields: input is to be read from 'contxt', which no row has; correct it"):
        made(input="contxt")
    assert made(input="context").tokens > made().tokens  # what one row lacks is no typo
