"""`precision: auto` measures; what wins depends on the machine and is not tested."""

from bigtune.train.precision import measure_precision


def test_one_of_the_two_precisions_is_chosen() -> None:
    assert measure_precision(size=64) in ("bfloat16", "float32")
