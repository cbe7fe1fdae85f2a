"""Which cases a sweep means, and what is said of one that means none."""

import pytest

from bigtune.bench.sweep import Case, cases_of, full_key, parse_ranks
from bigtune.errors import ConfigError


def test_cases_are_the_product_with_ranks_changing_fastest() -> None:
    cases = cases_of(["micro_batch=1,max", "deepspeed=zero2,zero3"], [2, 1])
    told = [(*case.settings.values(), case.ranks) for case in cases]
    assert told == [(size, preset, ranks) for size in (1, "max") for preset in ("zero2", "zero3") for ranks in (1, 2)]
    assert list(cases[0].settings) == ["train.micro_batch", "deepspeed"]


def test_without_a_sweep_there_is_the_run_file_itself() -> None:
    (case,) = cases_of([], [1])
    assert (case.overrides, case.name) == ([], "as the run file, ranks 1")


def test_values_are_what_the_run_file_would_hold() -> None:
    (first, second) = cases_of(["adapter=null,{rank: 8, target_modules: [q_proj, v_proj]}"], [1])
    assert first.settings == {"adapter": None}
    assert second.settings == {"adapter": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}}
    assert second.overrides == ["adapter={rank: 8, target_modules: [q_proj, v_proj]}"]
    assert [case.settings["optim.learning_rate"] for case in cases_of(["learning_rate=1e-4,0.1"], [1])] == [1e-4, 0.1]
    assert Case({"model.path": "1"}, 1).overrides == ["model.path='1'"]


def test_a_micro_batch_that_is_to_be_found_is_no_override() -> None:
    (case,) = cases_of(["micro_batch=max", "seed=3"], [1])
    assert case.searches and case.overrides == ["train.seed=3"]
    assert not cases_of(["micro_batch=4"], [1])[0].searches


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("micro_batch", "train.micro_batch"),
        ("sequence_length", "data.sequence_length"),
        ("deepspeed", "deepspeed"),
        ("activation_checkpointing", "train.activation_checkpointing"),
        ("path", "model.path"),  # those of sources are in lists
        ("clean.min_tokens", "data.clean.min_tokens"),
        ("data.sources.0.weight", "data.sources.0.weight"),
        ("data.sources.12.path", "data.sources.12.path"),
    ],
)
def test_a_key_in_full_or_its_end(name: str, key: str) -> None:
    assert full_key(name) == key


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["micro_bach=1"], "--sweep micro_bach: no key of the run file; near are train.micro_batch"),
        (["xyzzy=1"], "--sweep xyzzy: no key of the run file; docs/run-file.md lists all"),
        (["sources=a"], "--sweep sources: may mean data.sources, evaluate.sources; write the one that is meant"),
        (["steps=5"], "--sweep train.steps: bench sets it itself: --steps and --warm-up say how many there are"),
        (["keep_last=5"], "--sweep checkpoint.keep_last: bench sets it itself: no checkpoint is written"),
        (["micro_batch"], "--sweep micro_batch: write key=value,value"),
        (["micro_batch="], "--sweep micro_batch=: write key=value,value"),
        (["micro_batch=1", "train.micro_batch=2"], "--sweep train.micro_batch=2: train.micro_batch is given twice"),
    ],
)
def test_what_means_no_case_is_told_in_one_line(sweep: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        cases_of(sweep, [1])
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_numbers_of_ranks() -> None:
    assert parse_ranks("1, 2,4") == [1, 2, 4]
    for wrong in ("0", "1,,2", "two", "-1"):
        with pytest.raises(ConfigError, match="write numbers from 1"):
            parse_ranks(wrong)
