"""Histograms lose no value, and their axes fit the numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtune.report.histogram import BINS, of_counts, of_shares, percentiles
from bigtune.report.svg import histogram_svg


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=200), st.none() | st.integers(8, 10**6))
def test_every_value_is_in_its_bin(values: list[int], mark: int | None) -> None:
    histogram = of_counts(np.array(values), mark)
    assert histogram.total == len(values) and len(histogram.counts) <= BINS + 1
    assert list(histogram.edges) == sorted(set(histogram.edges))
    counts = np.bincount([histogram.bin(value) for value in values], minlength=len(histogram.counts))
    assert tuple(counts) == histogram.counts
    assert all(histogram.edges[0] <= tick <= histogram.edges[-1] for tick in histogram.ticks(6))
    assert len(histogram.ticks(6)) <= 7 and all(tick.is_integer() for tick in histogram.ticks(6))


@pytest.mark.parametrize(("longest", "logarithmic"), [(500, False), (20_000, True)])
def test_a_long_tail_gets_a_logarithmic_axis(longest: int, logarithmic: bool) -> None:
    histogram = of_counts(np.array([100, 150, 160, 200, 220, longest]))
    assert histogram.logarithmic == logarithmic
    assert (longest / 100 > 5) == (histogram.place(1000) < 0.6)  # 10 times the least is not far out on a long axis


def test_a_mark_that_is_near_is_on_the_axis_and_one_that_is_far_is_not() -> None:
    lengths = np.array([100, 200, 300])
    assert 0 < of_counts(lengths, 512).place(512) <= 1
    assert of_counts(lengths, 8192).place(8192) > 1


def test_whole_shares_are_in_the_last_bin() -> None:
    histogram = of_shares(np.array([0.0, 0.5, 1.0, 1.0]))
    assert histogram.counts[-1] == 2 and histogram.counts[0] == 1 and histogram.total == 4


def test_percentiles_are_values() -> None:
    found = percentiles(np.arange(1, 101))
    assert (found["min"], found["p50"], found["p99"], found["max"], found["mean"]) == (1, 51, 99, 100, 50.5)


def test_a_plot_has_a_bar_for_every_bin_that_is_not_empty() -> None:
    histogram = of_counts(np.array([10, 10, 20, 500, 700]), 512)
    drawn = str(histogram_svg(histogram, "lengths <b>", "{:,.0f}", (512, "sequence_length")))
    assert drawn.count("<rect") == sum(count > 0 for count in histogram.counts)
    assert drawn.count('class="bar beyond"') == 1 and "<b>" not in drawn
