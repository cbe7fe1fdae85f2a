"""What is said of two benchmarks, and what the noise must not be taken for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigtune.bench.compare import FASTER, SAME, SLOWER, compare, ratio_of
from bigtune.bench.result import Result, read_results
from bigtune.bench.sweep import Case
from bigtune.errors import ConfigError
from tests.bench.lines import HOST, result


def keyed(*results: Result) -> dict[str, Result]:
    return {each.key: each for each in results}


@pytest.mark.parametrize(("speed", "verdict"), [(1.1, FASTER), (0.9, SLOWER), (1.0, SAME)])
def test_a_difference_beyond_the_noise_is_told_from_one_within(speed: float, verdict: str) -> None:
    (change,) = compare(keyed(result(1.0)), keyed(result(speed))).changes
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(speed)
    assert change.low <= change.ratio <= change.high


def test_the_same_difference_is_within_a_larger_noise() -> None:
    """The mutation: without the noise in view, 1.02 would be faster in both."""
    (quiet,) = compare(keyed(result(1.0, noise=0.01)), keyed(result(1.02, noise=0.01))).changes
    (loud,) = compare(keyed(result(1.0, noise=0.3)), keyed(result(1.02, noise=0.3))).changes
    assert quiet.ratio == pytest.approx(loud.ratio)
    assert (quiet.verdict, loud.verdict) == (FASTER, SAME)


def test_the_interval_holds_the_true_quotient_19_times_of_20() -> None:
    """Of steps drawn from distributions that are known; a bootstrap of 30 steps is a little too sure."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        sides = [{"tokens": [1.0] * 30, "seconds": random.lognormal(0, 0.2, 30).tolist()} for _ in range(2)]
        _, low, high = ratio_of(*sides)
        held += low <= 1 <= high
    assert 180 <= held < 200


def test_it_is_the_same_every_time() -> None:
    assert compare(keyed(result()), keyed(result(1.01))) == compare(keyed(result()), keyed(result(1.01)))


def test_cases_of_one_alone_and_such_as_were_not_measured_are_listed() -> None:
    a, b, c = ({"train.micro_batch": size} for size in (1, 2, 3))
    failed = Result(Case(b, 1), "out of memory", machine=HOST)
    found = compare(keyed(result(settings=a), result(settings=b)), keyed(failed, result(settings=c)))
    assert found.changes == ()
    assert found.unmeasured == {"train.micro_batch=2, ranks 1": {"after": "out of memory"}}
    assert found.only_before == ("train.micro_batch=1, ranks 1",)
    assert found.only_after == ("train.micro_batch=3, ranks 1",)


def test_other_machines_versions_and_run_files_are_told() -> None:
    before = result(run={"optim": {"name": "adamw"}, "train": {"micro_batch": 1}, "output": "a"})
    after = replace(
        result(run={"optim": {"name": "sgd"}, "train": {"micro_batch": 2}, "output": "b"}),
        machine=HOST | {"cores": 4, "torch": "3"}, busy_by_others=0.5,
    )  # fmt: skip
    found = compare(keyed(before), keyed(after))
    assert [(each.what, each.before, each.after) for each in found.machine] == [("cores", 2, 4), ("torch", "2", "3")]
    assert [each.what for each in found.run_file] == ["optim.name"]  # the micro batch is the case's own
    assert [warning.split(":")[0] for warning in found.warnings] == [
        "the machines differ", "other processes kept the machine busy (after)",
    ]  # fmt: skip
    same = replace(before, machine=HOST | {"commit": "b" * 40})
    assert compare(keyed(before), keyed(same)).warnings == ()


def test_results_are_read_as_they_were_written_and_the_last_of_a_case_counts(tmp_path: Path) -> None:
    failed = Result(Case({}, 2), "no", tries=[{"micro_batch": 1, "reason": "no"}])
    text = "".join(json.dumps(each.to_json()) + "\n" for each in (result(), result(1.5), failed))
    (tmp_path / "bench.jsonl").write_text(text)
    assert read_results(tmp_path) == read_results(tmp_path / "bench.jsonl")
    read = read_results(tmp_path)
    assert [json.dumps(each.to_json()) for each in read.values()] == text.splitlines()[1:]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "is empty; give a bench.jsonl of bigtune bench"),
        ("{}\n", "line 1: no result of bigtune bench"),
        ("[1]\n", "line 1: no result of bigtune bench"),
        ("{\n", "line 1: no result of bigtune bench"),
    ],
)
def test_what_holds_no_results_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read_results(path)
    assert str(error.value).startswith(f"--compare {path}")
