"""`bigtune prepare` counts what it leaves out, and says what is wrong."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtune.config import Clean, Data, Source, TrainingSource
from bigtune.data import recipe
from bigtune.data.chat import ChatFormat, load_tokenizer
from bigtune.data.formats import read_conversations
from bigtune.data.holdout import bound
from bigtune.data.manifest import Manifest
from bigtune.data.prepare import prepare
from bigtune.data.store import Store
from bigtune.errors import DataError, ModelError
from tests.data.rows import LONG, SHORT, WriteRows, data, many, qa, removed, written


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
