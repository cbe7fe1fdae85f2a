"""Where a run starts: a checkpoint of the same run, or the beginning; never a checkpoint of another run."""

from pathlib import Path
from typing import Any

import pytest

from bigtune.checkpoint.layout import Layout
from bigtune.config import Run
from bigtune.errors import CheckpointError, ConfigError
from bigtune.runfile import to_yaml
from bigtune.train.start import find_start
from tests.tiny import tiny_run


def saved(run: Run, step: int) -> Path:
    """What `find_start` looks at of a checkpoint."""
    folder = run.output / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    Layout(1, "float32", (), {}, {}).write(folder)
    (folder / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    (folder.parent / "latest").write_text(folder.name + "\n")
    return folder


def test_an_empty_output_starts_at_the_beginning(tmp_path: Path) -> None:
    assert find_start(tiny_run(tmp_path), None) is None


def test_the_same_run_goes_on_from_what_latest_names(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    earlier, later = saved(run, 20), saved(run, 100)
    assert find_start(run, None) == find_start(run, "latest") == later
    assert find_start(run, "step-20") == earlier
    assert find_start(run, str(earlier)) == earlier
    (later.parent / "latest").write_text("step-20\n")
    assert find_start(run, None) == earlier


def test_what_is_asked_for_and_missing_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"--resume latest: /.*/checkpoints holds no checkpoint"):
        find_start(run, "latest")
    saved(run, 20)
    with pytest.raises(CheckpointError, match=r"--resume step-30: /.*step-30 is no checkpoint"):
        find_start(run, "step-30")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match=f"--resume {path}: .* is no checkpoint"):
            find_start(run, str(path))


def test_a_latest_that_names_no_checkpoint_says_how_to_mend_it(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    (saved(run, 20) / "layout.json").unlink()
    with pytest.raises(CheckpointError, match=r"latest: names step-20, .* write another step's name in it"):
        find_start(run, None)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"optim__learning_rate": 0.1}, "optim.learning_rate: 0.003 → 0.1"),
        ({"optim__name": "adamw"}, "optim.name: adamw_8bit → adamw"),
        ({"optim__betas": [0.5, 0.6]}, "optim.betas: [0.9, 0.95] → [0.5, 0.6]"),
        ({"train__seed": 7}, "train.seed: 0 → 7"),
        ({"train__global_batch": 8}, "train.global_batch: 4 → 8"),
        ({"train__precision": "bfloat16"}, "train.precision: float32 → bfloat16"),
        ({"data__sequence_length": 64}, "data.sequence_length: 96 → 64"),
        ({"model": {"path": "other"}}, "/model → other"),
        ({"deepspeed": "other"}, "deepspeed: zero3 → other"),
    ],
)
def test_a_change_that_matters_is_refused_and_shown(tmp_path: Path, change: dict[str, Any], shown: str) -> None:
    saved(tiny_run(tmp_path), 20)
    for resume in (None, "latest", "step-20"):
        with pytest.raises(ConfigError) as caught:
            find_start(tiny_run(tmp_path, **change), resume)
        assert shown in str(caught.value)
        assert str(caught.value).count("→") == 1  # nothing but the difference


@pytest.mark.parametrize(
    "change",
    [
        {"train__steps": 50},
        {"train__steps": None, "train__epochs": 3},
        {"train__micro_batch": 2},
        {"train__activation_checkpointing": "full", "train__max_skipped_steps": 1, "train__step_timeout_seconds": 9.0},
        {"checkpoint": {"every_steps": 3, "keep_last": 1}},
        {"evaluate": {"sources": [{"path": "held.jsonl"}]}},
        {"data__store": "elsewhere"},
    ],
)
def test_a_change_that_leaves_the_state_its_meaning_is_allowed(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = saved(tiny_run(tmp_path), 20)
    assert find_start(tiny_run(tmp_path, **change), None) == folder


def test_a_run_may_go_on_in_another_output(tmp_path: Path) -> None:
    folder = saved(tiny_run(tmp_path), 20)
    assert find_start(tiny_run(tmp_path, output=str(tmp_path / "elsewhere")), str(folder)) == folder
