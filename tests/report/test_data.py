"""`bigtune inspect` accounts for every row, shows documents as they are trained on, and what training would refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bigtune import api
from bigtune.cli import main
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.data.store import REMOVED
from bigtune.errors import DataError
from bigtune.report.inspection import Inspection, Sample
from bigtune.report.samples import draw
from bigtune.runfile import to_yaml
from tests.report.conftest import END, MakeRun, questions, write


def text_of(sample: Sample) -> str:
    return "".join(token.text for token in sample.tokens)


def supervised_text(sample: Sample) -> str:
    return "".join(token.text for token in sample.tokens if token.supervised)


def row_of(sample: Sample) -> dict[str, str]:
    """The row that a sample says it is from."""
    path, _, row = sample.where.rpartition(", row ")
    found: dict[str, str] = json.loads(Path(path).read_text().splitlines()[int(row) - 1])
    return found


def accounted(seen: Inspection) -> int:
    return seen.total.documents + sum(seen.dropped.values()) + seen.waiting_documents


# ------------------------------------------------------------------------------------------ what is counted


def test_every_row_is_trained_on_or_told_of(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [*questions(60), *questions(5), {"question": "no answer"}, {"other": 1}]
    rows += [{"question": "long?", "answer": "long " * 200}, {"question": "silent?", "answer": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    run = make_run(path, on_bad_row="skip", holdout=0.1, clean={"exact_duplicates": True})
    seen = api.inspect(run)
    assert accounted(seen) == seen.source_rows == len(rows)
    reasons = seen.dropped
    assert reasons["held out for evaluation"] > 0 and reasons["documents longer than 128 tokens"] == 1
    assert 0 < reasons["exact duplicate"] <= 5 and len(reasons) >= 5
    told = {loss.reason: loss for loss in seen.losses}
    assert told["exact duplicate"].examples[0].where.startswith(f"{path}, row 6")
    assert told["exact duplicate"].examples[0].like.startswith(f"{path}, row ")
    assert told["documents longer than 128 tokens"].examples[0].where == f"{path}, row 68"


def test_the_packing_is_that_of_the_training(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(write(tmp_path / "a.jsonl", questions(50)), train={"epochs": 3})
    seen = api.inspect(run, rows=10**6, ranks=4)
    assert seen.packing is not None
    assert len(seen.rows) == seen.packing.rows
    assert sum(row.tokens for row in seen.rows) == seen.packing.tokens == seen.total.tokens
    assert seen.packing.efficiency == seen.total.tokens / (len(seen.rows) * 128)
    assert sum(len(row.documents) for row in seen.rows) == 50
    assert sum(d.supervised for row in seen.rows for d in row.documents) == seen.total.supervised_tokens
    assert seen.packing.steps == -(-len(seen.rows) // 4)
    assert seen.packing.run_steps == -(-3 * len(seen.rows) // 4)
    assert 1 <= seen.packing.work_imbalance <= 4


def test_shares_of_a_mixture_are_those_of_the_epoch(make_run: MakeRun, tmp_path: Path) -> None:
    few, many = write(tmp_path / "few.jsonl", questions(30)), write(tmp_path / "many.jsonl", questions(200, 30))
    seen = api.inspect(make_run({"path": str(few), "weight": 1.0}, {"path": str(many), "weight": 3.0}), rows=100)
    first, second = seen.sources
    assert (first.asked_share, second.asked_share) == (0.25, 0.75)
    assert abs(first.tokens_share - 0.25) < 0.02
    in_rows = sum(d.length for row in seen.rows for d in row.documents if d.where.startswith(str(many)))
    assert second.tokens == in_rows and second.tokens_share == in_rows / seen.total.tokens
    assert seen.waiting_documents > 0 and accounted(seen) == 230


def test_documents_beyond_a_cap_are_told_of(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(30))
    seen = api.inspect(make_run({"path": str(path), "max_documents": 12}))
    assert seen.total.documents == 12 and seen.dropped == {"more than data.sources.max_documents": 18}


def test_truncated_and_split_documents_are_told_of(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*questions(20), {"question": "long?", "answer": "long " * 200}])
    whole = api.inspect(make_run(path, sequence_length=2048))
    cut = api.inspect(make_run(path, on_long_document="truncate"), samples=21)
    assert sum(sample.length for sample in cut.samples) == cut.total.tokens  # as they are packed, not as they were
    assert [sample.length for sample in cut.samples if sample.note] == [128]
    assert cut.truncated_documents == 1 and cut.truncated_tokens == whole.total.tokens - cut.total.tokens > 0
    split = api.inspect(make_run(path, on_long_document="split"), rows=100)
    assert split.split_documents == 1 and split.sources[0].pieces > split.total.documents == 21
    pieces = [d for row in split.rows for d in row.documents if d.note]
    assert sum(piece.supervised for piece in pieces) == split.total.supervised_tokens - sum(
        d.supervised for row in split.rows for d in row.documents if not d.note
    )
    assert any(piece.note.startswith("its tokens 1 to 128 of ") for piece in pieces)


# ------------------------------------------------------------------------------------------- what is shown


def test_samples_say_where_they_are_from_and_what_is_learnt(make_run: MakeRun, tmp_path: Path) -> None:
    seen = api.inspect(make_run(write(tmp_path / "a.jsonl", questions(40))), samples=8, rows=1)
    shown = [*seen.samples, *seen.rows[0].documents]
    assert len(seen.samples) == 8
    for sample in shown:
        row = row_of(sample)
        assert supervised_text(sample) == row["answer"] + END
        assert text_of(sample).startswith(f"### Instruction:\n{row['question']}")
        assert sample.tokens[-1].special
    assert len({sample.where for sample in seen.samples}) == 8


def test_weights_of_single_turns_are_shown(make_run: MakeRun, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "half", "weight": 0.5},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "none", "train": False},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "whole"},
    ]
    seen = api.inspect(make_run(write(tmp_path / "a.jsonl", [{"messages": messages}])))
    by_weight = {weight: "".join(t.text for t in seen.samples[0].tokens if t.weight == weight) for weight in (0.5, 1.0)}
    assert by_weight == {0.5: f"half{END}", 1.0: f"whole{END}"}
    assert "none" not in supervised_text(seen.samples[0])


def test_samples_are_spread_over_sources_and_are_a_matter_of_the_seed() -> None:
    sources = np.array([0] * 1000 + [1] * 3 + [3] * 50)
    drawn = draw(sources, 9, seed=1)
    assert np.bincount(sources[drawn]).tolist() == [3, 3, 0, 3] and len(set(drawn)) == 9
    assert draw(sources, 9, seed=1) == drawn != draw(sources, 9, seed=2)
    assert sorted(draw(sources, 5000, seed=1)) == list(range(1053))


def test_documents_with_nothing_supervised_are_shown_beside_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    silent = {
        "messages": [
            {"role": "user", "content": "Mute?"},
            {"role": "assistant", "content": "not learnt", "train": False},
        ]
    }
    seen = api.inspect(make_run(write(tmp_path / "a.jsonl", [*questions(9), silent])), samples=2)
    assert [sample.note for sample in seen.samples] == ["", "", "left out: nothing supervised"]
    assert "not learnt" in text_of(seen.samples[-1]) and not seen.samples[-1].supervised
    assert not seen.refusal


# ---------------------------------------------------------------------------- what training would refuse


def refused(run: Run) -> str:
    with pytest.raises(DataError) as error:
        prepare(run.data, run.model.path, run.store)
    return str(error.value)


def test_a_run_with_nothing_supervised_is_shown_and_still_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(write(tmp_path / "a.jsonl", questions(12)), supervise=["tool"])
    seen = api.inspect(run)
    assert seen.refusal == refused(run)  # the store that was made to look at lets no training through
    assert len(seen.samples) == 3 and "### Response" in text_of(seen.samples[0])
    assert seen.packing is None and seen.rows == ()
    assert seen.lengths and seen.lengths.total == 12
    assert seen.total.documents == 0 and seen.dropped == {"nothing supervised": 12}


def test_a_run_with_next_to_nothing_supervised_is_packed_and_still_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(write(tmp_path / "a.jsonl", questions(12)), min_supervised=0.9)
    seen = api.inspect(run)
    assert seen.refusal == refused(run) and "data.min_supervised" in seen.refusal
    assert seen.packing and seen.rows and seen.total.documents == 12
    assert not api.inspect(make_run(tmp_path / "a.jsonl", min_supervised=0.1)).refusal


def test_a_run_whose_documents_are_all_too_long_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(12))
    seen = api.inspect(make_run(path, sequence_length=8))
    assert "every document is longer than data.sequence_length (8)" in seen.refusal
    assert seen.dropped == {"documents longer than 8 tokens": 12} and seen.total.documents == 0
    assert len(seen.samples) == 3
    seen = api.inspect(make_run(path, sequence_length=8, on_long_document="error"))
    assert "data.on_long_document" in seen.refusal and seen.total.documents == 12


# -------------------------------------------------------------------------------------------- streamed


def test_of_a_stream_the_beginning_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", questions(40)), write(tmp_path / "b.jsonl", questions(30, 40))
    run = make_run(first, second, stream=True, train={"epochs": None, "steps": 5})
    seen = api.inspect(run, samples=4)
    assert seen.streamed and seen.source_rows is None and not run.store.exists()
    assert seen.total.documents == 70 and seen.packing and seen.packing.steps is None and seen.packing.run_steps == 5
    assert {sample.where.partition(", ")[0] for sample in seen.samples} == {str(first), str(second)}
    for sample in seen.samples:
        assert supervised_text(sample) == row_of(sample)["answer"] + END
    assert len(seen.rows) == 1 and seen.rows[0].tokens <= 128


def test_a_stream_with_nothing_supervised_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(40))
    seen = api.inspect(make_run(path, stream=True, supervise=["tool"], train={"epochs": None, "steps": 5}))
    assert "a whole epoch (40 × nothing supervised)" in seen.refusal
    assert len(seen.samples) == 3 and seen.packing is None


def test_a_stream_with_next_to_nothing_supervised_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(40))
    seen = api.inspect(make_run(path, stream=True, min_supervised=0.9, train={"epochs": None, "steps": 5}))
    assert "data.min_supervised" in seen.refusal and seen.packing and seen.rows


# -------------------------------------------------------------------------------------------- command


def run_file(run: Run, folder: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    return str(path)


def test_json_is_all_that_is_printed_and_has_the_statistics(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(write(tmp_path / "a.jsonl", [*questions(30), {"other": 1}]), on_bad_row="skip")
    done = CliRunner().invoke(main, ["inspect", run_file(run, tmp_path), "--json", "--ranks", "3"])
    assert done.exit_code == 0
    tree = json.loads(done.stdout)
    assert tree["documents"] == 30 and sum(tree["dropped"].values()) == 1 and tree["source_rows"] == 31
    assert tree["packing_efficiency"] == tree["tokens"] / (tree["rows"] * 128)
    assert 0 < tree["supervised_tokens"] < tree["tokens"] and tree["refused"] is None
    assert tree["sources"][0]["supervised_tokens"] == tree["supervised_tokens"]
    assert tree["lengths_tokens"]["min"] <= tree["lengths_tokens"]["p50"] <= tree["lengths_tokens"]["max"]
    assert tree["imbalance"]["ranks"] == 3 and tree["template"] == "plain"


def test_bad_input_is_one_line(make_run: MakeRun, tmp_path: Path) -> None:
    def told(run: Run, *options: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["inspect", run_file(run, tmp_path), *options])
        return done.exit_code, done.stderr.strip().splitlines()[-1]

    path = write(tmp_path / "a.jsonl", [*questions(3), {"other": 1}])
    code, line = told(make_run(path))
    assert code == 1 and "row 4" in line and "on_bad_row" in line
    run = make_run(write(path, questions(3)))
    code, line = told(run, "--html", str(tmp_path))
    assert code == 2 and line == f"Error: --html {tmp_path}: cannot be written (Is a directory); name another file"
    run = make_run(write(path, [*questions(3), {"other": 1}]), on_bad_row="skip")
    api.inspect(run)
    (run.store / REMOVED).write_text("no JSON\n")
    code, line = told(run)
    assert code == 1 and line.startswith(f"Error: {run.store / REMOVED}: cannot be read")
    code, line = told(make_run(tmp_path / "none.jsonl"))
    assert code == 1 and "none.jsonl" in line
