"""`bigtune prepare` works once for the same inputs, counts what it leaves out, and says what is wrong."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Data, Source
from bigtune.data import prepare as room
from bigtune.data.prepare import prepare
from bigtune.data.store import Manifest, Store
from bigtune.errors import DataError, ModelError
from tests.disk import resize, small_disk

WriteRows = Callable[[Iterable[Mapping[str, Any]]], Path]


def qa(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


SHORT = [qa("Hi", "Hello"), qa("And?", "The sky is blue.")]
LONG = qa("Hi", "four " * 200)


def data(path: Path, **settings: Any) -> Data:
    return Data(sources=(Source(path=path),), sequence_length=settings.pop("sequence_length", 128), **settings)


def test_documents_are_stored_and_counted(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    manifest = prepare(data(write_rows(SHORT)), model_path, tmp_path / "s", lambda *call: calls.append(call))
    store = Store.open(tmp_path / "s")
    assert store.manifest == manifest and manifest.template == "default"
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
        "import sys; from pathlib import Path; from bigtune.config import Data, Source;"
        "from bigtune.data.prepare import prepare;"
        f"d = Data(sources=(Source(path=Path({str(rows)!r})),), sequence_length=128);"
        f"m = prepare(d, Path({str(model_path)!r}), Path({str(tmp_path / 's')!r}));"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules; print(m.fingerprint)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == first.fingerprint


def test_a_change_of_rows_or_template_prepares_anew(
    write_rows: WriteRows, model_path: Path, chatml: Any, tmp_path: Path
) -> None:
    first = prepare(data(write_rows(SHORT)), model_path, tmp_path / "s")
    more = prepare(data(write_rows([*SHORT, qa("1", "2")])), model_path, tmp_path / "s")
    chatml.save_pretrained(tmp_path / "chatml")
    other = prepare(data(write_rows(SHORT)), tmp_path / "chatml", tmp_path / "s")
    assert len({first.fingerprint, more.fingerprint, other.fingerprint}) == 3
    assert (more.documents, other.template) == (3, "model")


@pytest.mark.parametrize("room", [0.4, 0.99, 1], ids=["rows", "last rows", "manifest"])
def test_a_full_disk_leaves_no_store(write_rows: WriteRows, model_path: Path, tmp_path: Path, room: float) -> None:
    rows = write_rows([qa(f"Number {i}?", "four " * 20) for i in range(3000)])
    size = prepare(data(rows), model_path, tmp_path / "large").arrow_bytes
    with small_disk(tmp_path / "disk") as disk:
        resize(disk, int(room * size))
        with pytest.raises(DataError) as raised:
            prepare(data(rows), model_path, disk / "s")
        assert "cannot be written here (No space left on device); set data.store" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert list((disk / "s").iterdir()) == []
        resize(disk, "8m")
        assert prepare(data(rows), model_path, disk / "s").documents == 3000


def test_a_new_sequence_length_matters_only_to_long_documents(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    rows = write_rows([*SHORT, LONG])
    made = [prepare(data(rows, sequence_length=n), model_path, tmp_path / "s") for n in (128, 100, 2048, 4096)]
    prints = [manifest.fingerprint for manifest in made]
    assert [manifest.documents for manifest in made] == [2, 2, 3, 3]
    assert len(set(prints[:3])) == 3 and prints[2] == prints[3]
    assert made[3] == made[2]  # read, not made again


def test_long_documents_are_dropped_truncated_or_refused(
    write_rows: WriteRows, model_path: Path, tmp_path: Path
) -> None:
    rows = write_rows([*SHORT, LONG, qa("why " * 200, "so")])
    dropped = prepare(data(rows), model_path, tmp_path / "a")
    assert dropped.documents == 2 and dropped.dropped == {"longer than 128 tokens": 2}
    cut = prepare(data(rows, on_long_document="truncate"), model_path, tmp_path / "b")
    assert (cut.documents, cut.truncated) == (3, 1)
    assert cut.dropped == {"no answer left after truncation": 1}
    last = Store.open(tmp_path / "b").document(2)
    assert len(last.input_ids) == 128 and last.spans[-1, 1] == 128
    assert "truncated 1 to 128 tokens" in cut.summary()
    with pytest.raises(DataError, match=r"row 3: .* tokens, more than data.sequence_length 128"):
        prepare(data(rows, on_long_document="error"), model_path, tmp_path / "c")
    with pytest.raises(DataError):
        Store.open(tmp_path / "c")


def test_rows_that_the_template_refuses_are_bad_rows(
    write_rows: WriteRows, make_tokenizer: Callable[..., Any], chatml: Any, tmp_path: Path
) -> None:
    strict = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    make_tokenizer(strict + chatml.chat_template).save_pretrained(tmp_path / "m")
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]
    refused = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = write_rows([*SHORT, refused])
    with pytest.raises(DataError, match=r"row 3: the chat template refuses .*no system"):
        prepare(data(rows), tmp_path / "m", tmp_path / "s")
    made = prepare(data(rows, on_bad_row="skip"), tmp_path / "m", tmp_path / "s")
    assert made.documents == 2 and made.skipped == {"refused by the chat template": 1}


def test_nothing_to_train_on_is_an_error(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    for rows, why in (([], "the files are empty"), ([LONG], "1 × longer than 128 tokens")):
        with pytest.raises(DataError, match=f"nothing to train on is left .*{why}"):
            prepare(data(write_rows(rows)), model_path, tmp_path / "s")
    with pytest.raises(DataError, match=r"1 × unknown format"):
        prepare(data(write_rows([{"a": 1}]), on_bad_row="skip"), model_path, tmp_path / "s")


def test_missing_files_are_named_before_any_work(write_rows: WriteRows, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        prepare(data(tmp_path / "gone.jsonl"), model_path, tmp_path / "s")
    with pytest.raises(ModelError, match=r"no such model folder"):
        prepare(data(write_rows(SHORT)), tmp_path / "gone", tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data.store"):
        prepare(data(write_rows(SHORT)), model_path, tmp_path / "file" / "s")
    with pytest.raises(DataError, match=r"set data.store"):
        prepare(data(write_rows(SHORT)), model_path, tmp_path / "file")


def test_of_several_ranks_one_works(
    write_rows: WriteRows, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[int] = []
    write = room._write

    def counted(*arguments: Any) -> Manifest:
        worked.append(1)
        return write(*arguments)

    monkeypatch.setattr(room, "_write", counted)
    rows = write_rows(SHORT)
    made: list[Manifest] = []
    ranks = [
        threading.Thread(target=lambda: made.append(prepare(data(rows), model_path, tmp_path / "s"))) for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(worked) == 1 and len(made) == 4 and len({manifest.fingerprint for manifest in made}) == 1
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["fingerprint"] == made[0].fingerprint
