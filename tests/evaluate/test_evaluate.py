import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bigtune import api
from bigtune.config import Data, Evaluate
from bigtune.errors import DataError, ModelError
from bigtune.evaluate.load import load
from bigtune.evaluate.report import Report
from bigtune.evaluate.run import evaluate
from bigtune.evaluate.table import render, render_shots, render_versus
from bigtune.evaluate.versus import versus
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
    return evaluate(Evaluate.model_validate(section), data, load(folder, "float32"), 0, progress)


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
    total = sum(score.held_out_loss.mean * score.answer_tokens for score in by_task)
    assert report.overall.held_out_loss.mean == pytest.approx(total / sum(score.answer_tokens for score in by_task))
    assert told[-1] == ("generate", 3, 3) and ("loss", 3, 3) in told
    assert [sample.question for sample in report.samples] == [row["question"] for row in ROWS]
    assert json.loads(json.dumps(report.to_json()))["overall"]["rows"] == 3
    assert "seen phrasing" in shown(render(report))


def test_an_answer_that_the_model_gives_is_right(model_folder: Path, write: Write) -> None:
    given = report_of(model_folder, write("t.jsonl", ROWS)).samples[0].output
    rows = [{**ROWS[0], "answer": given}, ROWS[1]]
    report = report_of(model_folder, write("known.jsonl", rows))
    assert [sample.scores["exact_match"] for sample in report.samples] == [1, 0]
    assert report.overall.metrics["exact_match"].mean == 0.5


def test_two_models_stand_side_by_side(model_folder: Path, write: Write) -> None:
    path = write("t.jsonl", ROWS)
    base, tuned = report_of(model_folder, path, prompt="plain", shots=0), report_of(model_folder, path)
    found = versus(base, tuned)
    text = shown(render_versus(found))
    assert re.search(rf"{base.overall.held_out_loss.mean:.3f} +{tuned.overall.held_out_loss.mean:.3f} +", text)
    gaps = [after.held_out_loss - before.held_out_loss for before, after in found.pairs]
    tokens = [after.answer_tokens for _, after in found.pairs]
    wanted = sum(gap * count for gap, count in zip(gaps, tokens, strict=True)) / sum(tokens)
    assert found.overall["held_out_loss"].difference.mean == pytest.approx(wanted)
    assert found.unpaired == 0 and set(found.by_task) == {"sums", "colours"}
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["pairs"][0][1]["question"] == ROWS[0]["question"]
    fewer = report_of(model_folder, path, max_rows=2)
    assert versus(base, fewer).unpaired == 1 and "left out: 1 rows" in shown(render_versus(versus(base, fewer)))


def test_rows_that_two_models_answer_differently_are_shown(model_folder: Path, write: Write) -> None:
    report = report_of(model_folder, write("t.jsonl", ROWS))
    better = replace(report.samples[1], output="12 [/]\x1b[31m", scores={"exact_match": 1.0})
    found = versus(report, replace(report, samples=(report.samples[0], better, report.samples[2])))
    assert found.where_they_differ() == [(report.samples[1], better)]
    text = shown(render_versus(found))
    assert "row 2: exact match 0.00 → 1.00" in text and "asked: how many are left" in text and "\x1b" not in text


def test_a_metric_that_fails_on_a_row_is_named_and_the_others_count(
    model_folder: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_of_a_test.py").write_text(
        "def half(output, reference, row):\n"
        "    if row['task'] == 'colours': raise ValueError('no colours')\n"
        "    return 0.5"
    )
    monkeypatch.chdir(tmp_path)
    path = write("t.jsonl", ROWS)
    report = report_of(model_folder, path, metrics=("exact_match", "half_of_a_test:half"))
    assert report.overall.metrics["half_of_a_test:half"].mean == 0.5
    assert report.by_task["colours"].metrics.keys() == {"exact_match"}
    said = " ".join(shown(render(report)).split())
    assert "half_of_a_test:half failed on 1 row, first" in said and "row 3: no colours" in said
    with pytest.raises(DataError, match=r"row 1: evaluate.metrics: number fails: the reference answer holds no number"):
        report_of(model_folder, write("words.jsonl", [{**row, "answer": "red"} for row in ROWS]), metrics=("number",))


def test_several_numbers_of_examples_stand_in_one_table(model_folder: Path, write: Write, tmp_path: Path) -> None:
    asked = write("t.jsonl", [{**row, "question": f"{row['question']}?"} for row in ROWS])
    section = {"sources": [{"path": str(asked)}], "max_new_tokens": 2}
    shots = {"shots_from": [{"path": str(write("shots.jsonl", [*ROWS, *({**row, "question": "x"} for row in ROWS)]))}]}
    run = tiny_run(tmp_path, evaluate={**section, **shots})
    reports = api.evaluate_shots(run, model_folder, [0, 1])
    assert [report.shots for report in reports] == [0, 1]
    assert reports[0].overall.held_out_loss != reports[1].overall.held_out_loss
    assert "examples" in shown(render_shots(reports))


def test_rows_too_long_for_the_context_are_left_out_and_counted(model_folder: Path, write: Write) -> None:
    long = [{"question": "long " * 300, "answer": "7"}, {"question": "how many", "answer": "long " * 300}]
    path = write("t.jsonl", [*ROWS, *long])
    report = report_of(model_folder, path)
    assert (report.overall.rows, report.rows_too_long, report.rows_unusable) == (3, 2, 0)
    assert "2 too long" in shown(render(report))
    with pytest.raises(DataError, match=r"no row fits.*max_new_tokens \(500\), and the model's context is 256"):
        report_of(model_folder, path, max_new_tokens=500)


def test_a_folder_that_is_no_model_is_one_clear_error(model_folder: Path, write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", ROWS)
    with pytest.raises(ModelError, match="no Hugging Face model folder"):
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
    broken = replace(report, overall=replace(report.overall, perplexity=float("inf")))
    assert json.loads(json.dumps(broken.to_json(), allow_nan=False))["overall"]["perplexity"] is None


def test_what_cannot_be_used_is_counted_where_it_is_skipped(model_folder: Path, write: Write, tmp_path: Path) -> None:
    # The plain template has no place for tools, and refuses such a row.
    write("a.jsonl", [ROWS[0], {"question": "no answer"}, {**ROWS[1], "tools": [{"name": "count"}]}, *ROWS[1:]])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-8])
    section = Evaluate.model_validate({"max_new_tokens": 2})
    data = Data.model_validate({"sources": [{"path": tmp_path}], "on_bad_row": "skip", "holdout": 0.5})
    report = evaluate(section, data, load(model_folder), 0, below=2**64)
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
