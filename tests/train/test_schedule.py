"""The learning rate of every step, from the first to the last."""

from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Optim
from bigtune.data.prepare import prepare
from bigtune.train.schedule import learning_rate
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import differing, metrics, step, train


def rates(steps: int, **settings: Any) -> list[float]:
    return [learning_rate(Optim(learning_rate=1.0, **settings), step, steps) for step in range(1, steps + 1)]


def test_warm_up_rises_by_equal_parts_to_the_full_rate() -> None:
    assert rates(8, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    for schedule in ("cosine", "linear", "constant", "wsd"):
        assert rates(5, schedule=schedule)[0] == 1.0


def test_linear_falls_by_equal_parts_and_wastes_no_step_at_zero() -> None:
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_down_in_the_middle_and_symmetric_about_it() -> None:
    found = rates(10, schedule="cosine")
    assert found[5] == pytest.approx(0.5)
    assert [found[5 - i] + found[5 + i] for i in range(5)] == pytest.approx([1.0] * 5)
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_step_after_the_last_would_have_the_final_rate(schedule: Any) -> None:
    optim = Optim(learning_rate=2.0, schedule=schedule, final_learning_rate=0.1, warmup_steps=3)
    assert learning_rate(optim, 11, 10) == pytest.approx(0.2)
    assert learning_rate(optim, 10, 10) > 0.2


def test_constant_stays() -> None:
    assert rates(6, schedule="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1, 1]


def test_a_warm_up_as_long_as_the_run_or_longer_just_rises() -> None:
    assert rates(4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
    assert rates(2, warmup_steps=4) == [0.25, 0.5]


def test_wsd_is_stable_and_then_falls_by_equal_parts() -> None:
    assert rates(9, schedule="wsd", warmup_steps=2, decay_steps=3) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )


def test_wsd_decays_over_a_tenth_of_the_steps_unless_told() -> None:
    found = rates(40, schedule="wsd")
    assert found[:36] == [1.0] * 36
    assert found[36:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates(3, schedule="wsd") == pytest.approx([1.0, 1.0, 0.5])


def test_wsd_decays_after_the_warm_up_at_the_earliest() -> None:
    assert rates(5, schedule="wsd", warmup_steps=3, decay_steps=10) == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(("schedule", "same"), [("wsd", True), ("constant", True), ("cosine", False)])
def test_more_steps_leave_the_stable_phase_as_it_was(schedule: Any, same: bool) -> None:
    """So that a run resumed from it with more steps equals one that had them from the start; a cosine never does."""
    decay = {"decay_steps": 5} if schedule == "wsd" else {}
    short, long = (rates(steps, schedule=schedule, warmup_steps=2, **decay) for steps in (20, 50))
    assert (short[:15] == long[:15]) is same


def test_a_wsd_run_made_longer_before_its_decay_equals_one_that_was_as_long(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {
        "optim__schedule": "wsd", "optim__decay_steps": 2, "checkpoint__every_steps": 3,
        "data__store": str(tmp_path / "store"),
    }  # fmt: skip
    short = tiny_run(tmp_path, **settings, train__steps=5)
    made_longer = tiny_run(tmp_path, **settings, train__steps=8)
    as_long = tiny_run(tmp_path, **settings, train__steps=8, output=str(tmp_path / "long"))
    prepare(short.data, short.model.path, short.store)
    for run in (short, as_long):
        train(run)
    assert metrics(short)[-1]["learning_rate"] < metrics(as_long)[4]["learning_rate"]
    train(made_longer, resume="step-3")
    assert metrics(made_longer) == metrics(as_long)
    assert differing(step(made_longer, 8), step(as_long, 8)) == []
