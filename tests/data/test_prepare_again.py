"""`bigtune prepare` never does the same work twice, and what ends it half-way costs nothing but the rest."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Clean
from bigtune.data import inputs
from bigtune.data import prepare as room
from bigtune.data.manifest import Manifest
from bigtune.data.parts import make_part
from bigtune.data.prepare import prepare
from bigtune.data.store import PARTS, REMOVED, Store
from bigtune.errors import DataError
from tests.data.rows import SHORT, WriteRows, contents, data, many, qa, written
from tests.disk import fill, resize, small_disk


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


def test_a_full_temporary_folder_is_one_line(
    large: Path, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "tmp") as folder:
        fill(folder)
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        with pytest.raises(DataError, match=r"/tmp: cannot be written \(No space left on device\); .* set TMPDIR"):
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
