import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bigtune import api
from bigtune.config import Data, Evaluate
from bigtune.errors import DataError, ModelError
from bigtune.evaluate.report import Report, render, render_comparison
from bigtune.evaluate.run import evaluate
from tests.tiny import tiny_run

Write = Callable[..., Path]

ROWS = [
    {"question": "how many eggs", "answer": "7", "task": "sums", "tags": ["seen phrasing"]},
    {"question": "how many are left", "answer": "12", "task": "sums", "tags": ["new phrasing"]},
    {"question": "name a colour", "answer": "blue", "task": "colours", "tags": ["seen phrasing"]},
]


def report_of(folder: Path, path: Path, progress: Any = None, **settings: Any) -> Report:
    section = {"sources": [{"path": path}], "max_new_tokens": 8, "batch_size": 2, **settings}
    data = Data.model_validate({"sources": [{"path": path}]})
    return evaluate(Evaluate.model_validate(section), data, folder, 0, progress, "float32")


def shown(table: Any) -> str:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_scores_come_overall_by_task_and_by_tag(model_folder: Path, write: Write, prompt: str) -> None:
    told: list[tuple[str, int, int]] = []
    report = report_of(model_folder, write("t.jsonl", ROWS), lambda *said: told.append(said), prompt=prompt)
    assert report.overall.rows == 3
    assert {task: score.rows for task, score in report.by_task.items()} == {"sums": 2, "colours": 1}
    assert {tag: score.rows for tag, score in report.by_tag.items()} == {
        "seen phrasing": 2,
        "new phrasing": 1,
    }
    by_task = report.by_task.values()
    total = sum(score.held_out_loss * score.answer_tokens for score in by_task)
    assert report.overall.held_out_loss == pytest.approx(total / sum(score.answer_tokens for score in by_task))
    assert told[-1] == ("generate", 3, 3) and ("loss", 3, 3) in told
    assert [sample.question for sample in report.samples] == [row["question"] for row in ROWS]
    assert json.loads(json.dumps(report.to_json()))["overall"]["rows"] == 3
    assert "seen phrasing" in shown(render(report))


def test_an_answer_that_the_model_gives_is_right(model_folder: Path, write: Write) -> None:
    given = report_of(model_folder, write("t.jsonl", ROWS)).samples[0].output
    rows = [{**ROWS[0], "answer": given}, ROWS[1]]
    report = report_of(model_folder, write("known.jsonl", rows))
    assert [sample.correct for sample in report.samples] == [True, False]
    assert report.overall.exact_match == 0.5


def test_two_models_stand_side_by_side(model_folder: Path, write: Write) -> None:
    path = write("t.jsonl", ROWS)
    base, tuned = report_of(model_folder, path, prompt="plain", shots=0), report_of(model_folder, path)
    text = shown(render_comparison(base, tuned))
    assert f"{base.overall.held_out_loss:.3f} → {tuned.overall.held_out_loss:.3f}" in text
    assert "different rows" not in text
    fewer = report_of(model_folder, path, max_rows=2)
    assert "different rows" in shown(render_comparison(base, fewer))


def test_rows_too_long_for_the_context_are_left_out_and_counted(model_folder: Path, write: Write) -> None:
    long = [{"question": "long " * 300, "answer": "7"}, {"question": "how many", "answer": "long " * 300}]
    path = write("t.jsonl", [*ROWS, *long])
    report = report_of(model_folder, path)
    assert (report.overall.rows, report.rows_too_long, report.rows_unusable) == (3, 2, 0)
    assert "2 too long" in shown(render(report))
    with pytest.raises(DataError, match=r"no row fits.*max_new_tokens \(500\), and the model's context is 256"):
        report_of(model_folder, path, max_new_tokens=500)


def test_a_reference_without_a_number_is_an_error_where_numbers_are_compared(model_folder: Path, write: Write) -> None:
    with pytest.raises(DataError, match=r"row 3: evaluate.answer is 'number'"):
        report_of(model_folder, write("t.jsonl", ROWS), answer="number")


def test_a_folder_that_is_no_model_is_one_clear_error(model_folder: Path, write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", ROWS)
    with pytest.raises(ModelError, match="no such model folder"):
        report_of(tmp_path / "absent", path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        report_of(folder, path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    (folder / "config.json").write_text((model_folder / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        report_of(folder, path)
    (folder / "layout.json").write_text("{}")
    with pytest.raises(ModelError, match="bigtune merge"):
        report_of(folder, path)


def test_a_model_smaller_than_its_tokenizer_is_one_clear_error(
    model_folder: Path, write: Write, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "small"
    config = LlamaConfig.from_pretrained(model_folder)
    config.vocab_size = 50
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(ModelError, match="it has 50 embeddings, but its tokenizer gives token"):
        report_of(folder, write("t.jsonl", ROWS))


def test_a_report_of_a_broken_model_is_still_json(model_folder: Path, write: Write) -> None:
    report = report_of(model_folder, write("t.jsonl", ROWS))
    broken = replace(report, overall=replace(report.overall, held_out_loss=float("nan")))
    assert json.loads(json.dumps(broken.to_json(), allow_nan=False))["overall"]["held_out_loss"] is None


def test_what_cannot_be_used_is_counted_where_it_is_skipped(model_folder: Path, write: Write, tmp_path: Path) -> None:
    # The plain template has no place for tools, and refuses such a row.
    write("a.jsonl", [ROWS[0], {"question": "no answer"}, {**ROWS[1], "tools": [{"name": "count"}]}, *ROWS[1:]])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-8])
    section = Evaluate.model_validate({"max_new_tokens": 2})
    data = Data.model_validate({"sources": [{"path": tmp_path}], "on_bad_row": "skip", "holdout": 0.5})
    report = evaluate(section, data, model_folder, 0, below=2**64)
    assert report.unusable_by_reason == {
        "unknown format": 1,
        "unreadable file": 1,
        "refused by the chat template": 1,
    }
    assert (report.overall.rows, report.rows_unusable) == (3, 3)
    said = " ".join(shown(render(report)).split())
    assert "3 unusable (1 × unknown format, 1 × unreadable file, 1 × refused by the chat template)" in said


def test_documents_need_not_be_prepared_where_no_training_row_is_read(
    model_folder: Path, write: Write, tmp_path: Path
) -> None:
    asked = write("t.jsonl", [{**row, "question": f"{row['question']}?"} for row in ROWS])
    section = {"sources": [{"path": str(asked)}], "max_new_tokens": 2, "shots": 1}
    shots = {"shots_from": [{"path": str(write("shots.jsonl", ROWS))}]}
    report = api.evaluate(tiny_run(tmp_path, data__holdout=5, evaluate={**section, **shots}), model_folder)
    assert report.overall.rows == 3
    with pytest.raises(DataError, match="no prepared documents here"):
        api.evaluate(tiny_run(tmp_path, data__holdout=5, evaluate=section), model_folder)
