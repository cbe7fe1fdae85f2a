"""The folder of checkpoints: which steps there are, which is the latest, and what is removed."""

from pathlib import Path

import pytest

from bigtune.checkpoint.folder import clear_remains, latest, latest_step, point_at, remove, step_folder, steps_in
from bigtune.errors import CheckpointError


def test_latest_is_what_the_pointer_names_and_nothing_else(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    folder = step_folder(tmp_path, 3)
    folder.mkdir()
    assert latest(tmp_path) is None  # a folder that was never published
    point_at(folder)
    assert latest(tmp_path) == folder
    assert latest_step(tmp_path) == 3
    (tmp_path / "latest").write_text("step-4\n")
    with pytest.raises(CheckpointError, match="names step-4, which is not there; write another step's name in it"):
        latest(tmp_path)


def test_steps_come_in_order_and_remains_are_none(tmp_path: Path) -> None:
    for name in ("step-100", "step-20", "step-3.partial", "step-x", "step-20.replaced.partial", "other"):
        (tmp_path / name).mkdir()
    assert list(steps_in(tmp_path)) == [20, 100]
    assert clear_remains(tmp_path) == ["step-20.replaced.partial", "step-3.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-100", "step-20", "step-x"]
    assert clear_remains(tmp_path / "none") == []


def test_what_is_removed_is_gone(tmp_path: Path) -> None:
    (tmp_path / "step-3" / "model").mkdir(parents=True)
    (tmp_path / "step-3" / "model" / "config.json").touch()
    remove(tmp_path / "step-3")
    assert list(tmp_path.iterdir()) == []


def test_pointing_again_at_the_same_step_writes_nothing(tmp_path: Path) -> None:
    point_at(step_folder(tmp_path, 3))
    before = (tmp_path / "latest").stat().st_ino
    point_at(step_folder(tmp_path, 3))
    assert (tmp_path / "latest").stat().st_ino == before
    point_at(step_folder(tmp_path, 4))
    assert (tmp_path / "latest").read_text() == "step-4\n"
