"""Where a run starts: a checkpoint of the same run, or the beginning; never a checkpoint of another run."""

from pathlib import Path
from typing import Any

import pytest

from bigtune.checkpoint.folder import point_at
from bigtune.checkpoint.manifest import Manifest
from bigtune.config import Run
from bigtune.errors import CheckpointError, ConfigError
from bigtune.runfile import to_yaml
from bigtune.tensorfile import sums_of
from bigtune.train.start import changes_since, find_start
from tests.tiny import tiny_run


def saved(run: Run, step: int) -> Path:
    """What `find_start` looks at of a checkpoint."""
    folder = run.output / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    Manifest("id", {"run.yaml": sums_of(folder / "run.yaml")}).write(folder)
    point_at(folder)
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


def test_what_is_not_whole_is_passed_over_but_not_the_run(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    earlier, later = saved(run, 20), saved(run, 100)
    (later / "run.yaml").write_text("")
    assert find_start(run, None) == find_start(run, "latest") == earlier
    (earlier / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-100 is not whole \(run.yaml has 0 bytes of .*, nor is any of the 1"
    ):
        find_start(run, None)


FREE: list[dict[str, Any]] = [
    {"train__steps": 50},
    {"train__steps": None, "train__epochs": 3},
    {"train__micro_batch": 2},
    {"train__activation_checkpointing": "full", "train__max_skipped_steps": 1, "train__step_timeout_seconds": 9.0},
    {"train__time_limit_minutes": 60.0},
    {"checkpoint": {"every_steps": 3, "keep_last": 1}},
    {"evaluate": {"sources": [{"path": "held.jsonl"}]}},
    {"data__store": "elsewhere"},
]


@pytest.mark.parametrize("change", FREE)
def test_a_change_that_leaves_the_state_its_meaning_is_free(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = saved(tiny_run(tmp_path), 20)
    run = tiny_run(tmp_path, **change)
    assert find_start(run, None) == folder
    assert changes_since(run, folder, on_purpose=False, new_data=False) == []


DELIBERATE: list[tuple[dict[str, Any], str]] = [
    ({"optim__learning_rate": 0.1}, "optim.learning_rate: 0.003 → 0.1"),
    ({"optim__betas": [0.5, 0.6]}, "optim.betas: [0.9, 0.95] → [0.5, 0.6]"),
    ({"optim__weight_decay": 0.0}, "optim.weight_decay: 0.1 → 0.0"),
    ({"train__global_batch": 8}, "train.global_batch: 4 → 8"),
    ({"train__precision": "bfloat16"}, "train.precision: float32 → bfloat16"),
    ({"loss": {"z_loss": 0.1}}, "loss.z_loss: 0.0 → 0.1"),
    ({"deepspeed": "zero2"}, "deepspeed: zero3 → zero2"),
]


@pytest.mark.parametrize(("change", "shown"), DELIBERATE)
def test_a_change_of_what_is_computed_is_made_on_purpose_alone(
    tmp_path: Path, change: dict[str, Any], shown: str
) -> None:
    """Where the user names what to go on from; else all of it is listed, and nothing but it."""
    folder = saved(tiny_run(tmp_path), 20)
    run = tiny_run(tmp_path, **change)
    with pytest.raises(ConfigError) as caught:
        find_start(run, None)
    assert f"holds a run with other settings ({shown}); change them back, go on with the new ones by --resume" in str(
        caught.value
    )
    for resume in ("latest", "step-20", str(folder)):
        assert find_start(run, resume) == folder
    assert changes_since(run, folder, on_purpose=True, new_data=False) == [shown]


MEANINGLESS: list[tuple[dict[str, Any], str, str]] = [
    ({"optim__name": "adamw"}, "optim.name: adamw_8bit → adamw", "the saved state is another optimizer's"),
    ({"model": {"path": "other"}}, "/model → other", "the saved state is another model's"),
    ({"model": {"path": "m", "add_tokens": ["<t>"]}}, "model.path: ", "the saved state is another model's"),
    ({"adapter": {"rank": 3}}, "adapter: None → None", "the saved state is another adapter's"),
    ({"data__sequence_length": 64}, "data.sequence_length: 96 → 64", "the position in the data would mean other rows"),
    ({"train__seed": 7}, "train.seed: 0 → 7", "the position in the data would mean other rows"),
]


@pytest.mark.parametrize(("change", "shown", "why"), MEANINGLESS)
def test_a_change_that_would_make_the_result_meaningless_is_refused(
    tmp_path: Path, change: dict[str, Any], shown: str, why: str
) -> None:
    saved(tiny_run(tmp_path), 20)
    run = tiny_run(tmp_path, **change)
    for resume in (None, "latest", "step-20"):
        with pytest.raises(ConfigError) as caught:
            find_start(run, resume)
        assert why in str(caught.value)
        assert "adapter" in change or shown in str(caught.value)
        assert "change it back, or give another output" in str(caught.value)
    new_rows = why.startswith("the position")
    assert "--new-data begins the next epoch with them" in str(caught.value) or not new_rows
    if new_rows:
        assert find_start(run, None, new_data=True) is not None


def test_several_changes_are_all_listed(tmp_path: Path) -> None:
    saved(tiny_run(tmp_path), 20)
    run = tiny_run(tmp_path, optim__learning_rate=0.1, train__global_batch=8, train__steps=9)
    with pytest.raises(ConfigError) as caught:
        find_start(run, None)
    assert str(caught.value).count("→") == 2


def test_a_run_may_go_on_in_another_output(tmp_path: Path) -> None:
    folder = saved(tiny_run(tmp_path), 20)
    assert find_start(tiny_run(tmp_path, output=str(tmp_path / "elsewhere")), str(folder)) == folder
