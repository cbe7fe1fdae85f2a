"""The demo as a newcomer runs it, from raw text to the table."""

import re
from pathlib import Path

import pytest

from bigtune.demo.story import tell
from bigtune.demo.tasks import NEW, PHRASINGS, SEEN
from bigtune.errors import LaunchError


@pytest.mark.slow
def test_the_tuned_model_answers_what_it_was_never_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = tell(tmp_path / "demo")
    assert tuned.overall.metrics["exact_match"].mean > 0.7
    assert base.overall.metrics["exact_match"].mean < 0.3
    for report in (base, tuned):
        assert set(report.by_task) == set(PHRASINGS)
        assert set(report.by_tag) == {SEEN, NEW}
        assert report.rows_too_long == report.rows_unusable == 0
    assert all(
        tuned.by_task[task].held_out_loss.mean < score.held_out_loss.mean for task, score in base.by_task.items()
    )
    shown = capsys.readouterr().out
    number = r"[\d.]+%?"
    assert re.search(rf"all rows +held-out loss +320 +{number} +{number} +-{number} to -{number} +<0.001", shown)
    assert re.search(rf"exact match +320 +{number} +{number} +\+{number} to \+{number} +<0.001", shown)
    assert len(re.findall(r"^  before: ", shown, re.MULTILINE)) == 3
    for stage in ("base", "tuned"):
        assert len(list((tmp_path / "demo" / stage).glob("*.safetensors"))) >= 1


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my only copy")
    with pytest.raises(LaunchError, match="exists and is no demo's; give another --output"):
        tell(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "my only copy"
