"""The stages for Python: the same as the command line's, from one process."""

from pathlib import Path

import pytest

from bigtune import api
from bigtune.errors import ConfigError, DataError
from bigtune.runfile import load_run
from tests.tiny import tiny_model, tiny_run, write_rows


def test_the_chain_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    held = write_rows(tmp_path / "held.jsonl", count=6)
    run = tiny_run(tmp_path, evaluate={"sources": [{"path": str(held)}], "max_new_tokens": 4})
    manifest = api.prepare(run)
    assert f"prepare: {manifest.documents} documents" in capsys.readouterr().err
    assert api.train(run, ranks=1)
    assert api.train(run, ranks=1)  # done already, which is done as well
    assert load_run(run.output / "run.yaml") == run
    tuned = api.merge(run.output, tmp_path / "tuned")
    before, after = (api.evaluate(run, model).overall.held_out_loss.mean for model in (run.model.path, tuned))
    assert after < before - 0.1
    assert api.evaluate(run, run.output).overall == api.evaluate(run, tuned).overall  # merged for the time being
    assert not list((run.output / "checkpoints").glob(".merged-*"))


@pytest.mark.slow
def test_a_changed_source_costs_a_started_run_nothing(tmp_path: Path) -> None:
    """The documents that its checkpoint goes on with stay, and go on when the source is back."""
    tiny_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl")
    text = rows.read_text()
    assert api.train(tiny_run(tmp_path, train__steps=1), ranks=1)
    rows.write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="a source or the tokenizer changed since this run was started"):
        api.train(tiny_run(tmp_path, train__steps=2), ranks=1)
    rows.write_text(text)
    assert api.train(tiny_run(tmp_path, train__steps=2), ranks=1)


def test_a_run_without_held_out_rows_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no evaluate section"):
        api.evaluate(tiny_run(tmp_path), tmp_path)
