"""The search for the largest micro batch, and what a larger one is thought to need."""

import pytest

from bigtune.bench.largest import Need, largest, predicted_gib


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_it_finds_the_largest_of_any(most: int) -> None:
    for limit in range(most + 1):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        assert largest(most, fits) == limit
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1
        assert all(1 <= size <= most for size in tried)


def test_it_doubles_and_then_halves() -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 11

    assert largest(64, fits) == 11
    assert tried == [1, 2, 4, 8, 16, 12, 10, 11]


def test_a_prediction_is_on_the_line_through_the_two_largest() -> None:
    measured = {1: Need(3.0, 0.5), 2: Need(4.0, 1.0), 4: Need(8.0, 2.0)}
    assert predicted_gib(measured, 8) == 16.0
    assert predicted_gib(measured, 3) == 5.0


def test_of_one_size_alone_what_it_kept_grows_and_the_rest_stays() -> None:
    assert predicted_gib({2: Need(4.0, 1.0)}, 8) == 7.0


def test_nothing_is_predicted_without_a_smaller_one() -> None:
    assert predicted_gib({}, 1) is None
    assert predicted_gib({4: Need(8.0, 2.0)}, 4) is None
