"""Intervals and tests: what they must say of known samples, and how often they are wrong."""

import numpy as np
import pytest

from bigtune.evaluate.compare import difference, interval


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = [found.low <= 0.3 <= found.high for found in (interval(generator.random(80) < 0.3) for _ in range(200))]
    assert 0.9 <= np.mean(held) <= 1.0


def test_chance_alone_is_rarely_taken_for_a_difference() -> None:
    generator = np.random.default_rng(0)
    wrong = [difference(*generator.normal(size=(2, 40))).p_value < 0.05 for _ in range(200)]
    assert np.mean(wrong) < 0.1


def test_pairs_show_what_the_scores_alone_do_not() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(size=100)  # rows differ by far more than the models
    found = difference(hard, hard + 0.1 + 0.05 * generator.normal(size=100))
    assert found.p_value < 0.01 and 0.08 < found.low < 0.1 < found.high < 0.12


def test_a_loss_is_weighed_by_its_tokens() -> None:
    assert interval([1.0, 4.0], [3.0, 1.0]).mean == pytest.approx(1.75)
    assert difference([1.0, 4.0], [2.0, 4.0], [3.0, 1.0]).mean == pytest.approx(0.75)


def test_models_that_are_alike_and_few_rows() -> None:
    same = difference([0, 1, 1], [0, 1, 1])
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert difference([0, 0, 0], [1, 1, 1]).p_value == pytest.approx(0.25)  # 2 of 8 ways to flip three signs
    assert interval([0.5]).low == interval([0.5]).high == 0.5
