"""Figures from metrics made by hand, of which each number is known."""

import pytest

from bigtune.bench.figures import Figures, phases_of
from tests.bench.lines import lines


def test_the_warm_up_is_left_out_and_the_clock_goes_on_between_steps() -> None:
    figures = Figures.of(lines(), 2, ranks=2, first_step_seconds=9.0)
    assert figures.tokens_per_second == (300 + 400 + 500 + 600) / 5
    assert figures.supervised_tokens_per_second == (120 + 160 + 200 + 240) / 5
    assert figures.tokens_per_second_a_device == 180
    assert figures.supervised_tokens_per_second_a_device == 72
    assert figures.steps["seconds"] == [1, 2, 1, 1]
    assert figures.steps["tokens"] == [300, 400, 500, 600]
    assert figures.step_seconds == pytest.approx({"median": 1, "p10": 1, "p90": 1.7})
    assert figures.peak_memory_gib == 1.6
    assert figures.memory_gib == {"parameters": 0.5, "activations": 0.25}
    assert figures.rank_imbalance == pytest.approx(1.5)
    assert figures.first_step_seconds == 9.0


def test_one_rank_has_no_imbalance() -> None:
    assert Figures.of(lines(), 2, ranks=1).rank_imbalance is None


def test_phases_are_shares_of_the_steps_and_the_rest_is_other() -> None:
    timed = {"forward": 0.2, "backward": 0.3, "reduce": 0.05, "optimizer": 0.1}
    phases = Figures.of(lines(phase_seconds=timed), 2, ranks=1).phases
    assert list(phases) == ["data", "forward", "backward", "reduce", "optimizer", "other"]
    shares = {name: phase["share"] for name, phase in phases.items()}
    assert shares == pytest.approx(
        {"data": 0.08, "forward": 0.16, "backward": 0.24, "reduce": 0.04, "optimizer": 0.08, "other": 0.4}
    )
    assert phases["other"]["median_seconds"] == pytest.approx(0.25)


def test_phases_that_were_not_timed_are_not_guessed() -> None:
    assert list(Figures.of(lines(), 2, ranks=1).phases) == ["data"]


def test_phases_never_come_to_more_than_the_step() -> None:
    """A GPU's clock and its host's differ."""
    phases = phases_of(lines(phase_seconds={"forward": 0.5, "backward": 0.7})[2:], [1.0, 1.0, 1.0, 1.0])
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1)
    assert phases["other"]["share"] == 0
    assert phases["backward"]["share"] == pytest.approx(0.7 / 1.3)


def test_a_phase_that_some_steps_lack_counts_nothing_there() -> None:
    made = lines(phase_seconds={"forward": 0.2})[2:]
    made[1]["phase_seconds"] = {"forward": 0.2, "gather": 0.4}
    assert phases_of(made, [1.0] * 4)["gather"] == {"median_seconds": 0, "share": pytest.approx(0.1)}
