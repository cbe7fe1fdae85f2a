"""A run leaves in time for its last save, by clocks that nobody sets."""

import time

import pytest

from bigtune.train.limit import SPARE_SECONDS, TimeLimit


def test_without_a_limit_there_is_time() -> None:
    assert not TimeLimit(0.0, None, {}).is_near(1e9)
    assert not TimeLimit(0.0, None, {"SLURM_JOB_END_TIME": "unknown"}).is_near(1e9)


@pytest.mark.parametrize("step", [0.0, 40.0])
@pytest.mark.parametrize("save", [0.0, 25.0])
def test_it_is_near_when_another_step_and_a_save_may_not_fit(step: float, save: float) -> None:
    needed = 2 * (step + save) + SPARE_SECONDS
    for left, near in ((needed + 5, False), (needed - 5, True)):
        for limit in (
            TimeLimit(time.monotonic() + left - 600, 10.0, {}),
            TimeLimit(0.0, None, {"SLURM_JOB_END_TIME": str(round(time.time() + left))}),
            TimeLimit(time.monotonic(), 1e6, {"SLURM_JOB_END_TIME": str(round(time.time() + left))}),  # the sooner
        ):
            limit.note(step)
            limit.note(step / 2)
            assert limit.is_near(save) is near


def test_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TimeLimit(time.monotonic(), None, {"SLURM_JOB_END_TIME": str(round(time.time() + 3600))})
    now = time.time()
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert not limit.is_near(1.0)
