"""The sections of the run file: their defaults, and options that contradict each other, which are refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bigtune.config import Optim, Run
from bigtune.errors import ConfigError
from bigtune.runfile import resolve
from tests.tiny import tiny_run

HELD_OUT = {"sources": [{"path": "test.jsonl"}]}


def run_of(evaluate: dict[str, Any] | None = None, **data: Any) -> Run:
    """A run with changes to its `data`; a stream has steps in place of epochs."""
    return resolve(
        {
            "model": {"path": "models/base"},
            "data": {"sources": [{"path": "data/train.jsonl"}]} | data,
            "train": {"steps": 1} if data.get("stream") else {"epochs": 2},
            "evaluate": evaluate,
            "output": "runs/first",
        }
    )


def refused(evaluate: dict[str, Any] | None = None, **data: Any) -> str:
    """The message, which is one line."""
    with pytest.raises(ConfigError) as caught:
        run_of(evaluate, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_run_gets_the_documented_defaults() -> None:
    run = run_of()
    assert run.model.path == Path("models/base")
    assert [source.path for source in run.data.sources] == [Path("data/train.jsonl")]
    assert (run.data.sequence_length, run.data.on_bad_row, run.data.on_long_document) == (1024, "error", "drop")
    assert (run.optim.name, run.optim.learning_rate, run.optim.schedule) == ("adamw", 1e-4, "cosine")
    assert (run.optim.warmup_steps, run.optim.weight_decay, run.optim.max_grad_norm) == (0, 0.0, 1.0)
    assert (run.train.steps, run.train.epochs) == (None, 2)
    assert (run.train.micro_batch, run.train.global_batch, run.train.precision, run.train.seed) == (1, 8, "auto", 0)
    assert (run.checkpoint.every_steps, run.checkpoint.keep_last, run.evaluate) == (None, None, None)
    assert run.deepspeed == "zero3"
    assert run.store == Path("runs/first/data")


def train_of(**train: Any) -> Run:
    tree = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, "output": "o"}
    return resolve({**tree, "train": {"steps": 1, **train}})


@pytest.mark.parametrize("choice", ["none", "full", 1, 4])
def test_activations_are_checkpointed_in_no_layer_every_layer_or_every_kth(choice: str | int) -> None:
    assert train_of(activation_checkpointing=choice).train.activation_checkpointing == choice
    assert train_of().train.activation_checkpointing == "none"


@pytest.mark.parametrize("choice", ["some", 0, -1, 2.0, True, None])
def test_another_choice_of_layers_is_refused(choice: Any) -> None:
    with pytest.raises(ConfigError, match="allowed: none, full, or a number k, for every k-th layer"):
        train_of(activation_checkpointing=choice)


def test_a_micro_batch_of_more_rows_than_the_global_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch 9 is more than the 8 rows of global_batch; lower the first"):
        train_of(micro_batch=9)
    assert train_of(micro_batch=8).train.micro_batch == 8


def test_guards_can_be_turned_off() -> None:
    run = train_of(max_skipped_steps=None, step_timeout_seconds=None)
    assert (run.train.max_skipped_steps, run.train.step_timeout_seconds) == (None, None)
    assert train_of(step_timeout_seconds=60).train.step_timeout_seconds == 60.0


@pytest.mark.parametrize(
    ("optim", "settings"),
    [
        ({}, ((0.9, 0.95), 1e-8, None)),
        ({"name": "adamw_8bit", "betas": [0.8, 0.9]}, ((0.8, 0.9), 1e-8, None)),
        ({"name": "adam", "epsilon": 1e-6}, ((0.9, 0.95), 1e-6, None)),
        ({"name": "lion_8bit"}, ((0.9, 0.99), None, None)),
        ({"name": "sgd"}, (None, None, 0.9)),
        ({"name": "sgd", "momentum": 0.0, "betas": None}, (None, None, 0.0)),
    ],
)
def test_an_optimizer_gets_the_settings_that_it_has(optim: dict[str, Any], settings: tuple[Any, ...]) -> None:
    found = Optim(**optim)
    assert (found.betas, found.epsilon, found.momentum) == settings
    assert Optim(**found.model_dump()) == found  # as a checkpoint's run.yaml brings it back


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"name": "sgd", "betas": [0.9, 0.95]}, "betas is no setting of sgd, which has momentum; remove it"),
        ({"name": "lion_8bit", "epsilon": 1e-8}, "epsilon is no setting of lion_8bit, which has betas; remove it"),
        ({"momentum": 0.9}, "momentum is no setting of adamw, which has betas and epsilon; remove it"),
        (
            {"decay_steps": 5},
            "decay_steps is no setting of schedule: cosine; remove it, or set schedule: wsd",
        ),
        (
            {"schedule": "constant", "final_learning_rate": 0.1},
            "final_learning_rate is no setting of schedule: constant, which never falls; remove it",
        ),
    ],
)
def test_a_setting_that_nothing_would_use_is_refused(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**run_of().model_dump(mode="json"), "optim": optim})
    assert str(caught.value) == f"run: 'optim': {message}"


def test_a_run_cannot_be_changed() -> None:
    run = run_of()
    with pytest.raises(ValidationError, match="frozen"):
        run.train.seed = 3


@pytest.mark.parametrize("data", [{"sources": [{"path": ""}]}, {"store": ""}])
def test_an_empty_path_is_not_the_current_folder(data: dict[str, Any]) -> None:
    assert refused(**data).endswith("an empty path; name a file or folder")  # and nothing else is wrong


def test_decontamination_needs_held_out_rows() -> None:
    told = "data.clean.decontaminate compares with held-out rows, and there are none; name them in evaluate.sources"
    assert refused(clean={"decontaminate": 13}).endswith(f"{told}, or set data.holdout")
    assert refused(clean={"decontaminate": 13}, stream=True).endswith(told)  # where a holdout would be refused too
    run_of(clean={"decontaminate": 13}, holdout=0.1)
    run_of(HELD_OUT, clean={"decontaminate": 13})
    run_of(HELD_OUT, clean={"decontaminate": 13}, stream=True)


@pytest.mark.parametrize("evaluate", [None, {}, HELD_OUT])
def test_a_stream_cannot_compare_with_rows_held_out_of_itself(evaluate: dict[str, Any] | None) -> None:
    message = refused(evaluate, clean={"decontaminate": 13}, stream=True, holdout=0.1)
    assert "clean.decontaminate with holdout needs all rows, to compare with those held out" in message
    assert message.endswith("name such rows in evaluate.sources in place of holdout, or set data.stream: false")


def test_a_stream_has_no_store() -> None:
    message = refused(stream=True, store="docs")
    assert message.endswith(
        "stream prepares no documents, and store is where they lie; drop it, or set data.stream: false"
    )


def test_a_mixture_that_repeats_sources_has_weights() -> None:
    message = refused(mixture="all_exhausted")
    assert message.endswith("'data': mixture: all_exhausted goes with weights; give every source one, or drop it")
    run_of(mixture="all_exhausted", sources=[{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}])


@pytest.mark.parametrize(
    ("checkpoint", "wanted"),
    [
        ({"keep_every": 10}, "keep_every goes with keep_last; without that, all checkpoints are kept"),
        ({"keep_best": True}, "keep_best goes with keep_last; without that, all checkpoints are kept"),
        (
            {"keep_best": True, "keep_last": 2},
            "checkpoint.keep_best needs held-out rows; name some in evaluate.sources",
        ),
    ],
)
def test_what_is_kept_goes_together(tmp_path: Path, checkpoint: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, checkpoint=checkpoint)
    assert wanted in str(caught.value)


def test_cleaning_leaves_some_length() -> None:
    message = refused(clean={"min_tokens": 2000, "max_tokens": 1999})
    assert "'data.clean': no document has min_tokens 2,000 and max_tokens 1,999; lower the first" in message
    run_of(clean={"min_tokens": 5, "max_tokens": 5})


@pytest.mark.parametrize("what", ["drop", "error"])
def test_cleaning_leaves_documents_that_fit_a_row(what: str) -> None:
    message = refused(sequence_length=64, clean={"min_tokens": 65}, on_long_document=what)
    assert "clean.min_tokens 65 keeps what is longer than sequence_length 64" in message
    assert f"on_long_document: {what} lets none of it in; lower the first, raise the second, or set" in message
    run_of(sequence_length=64, clean={"min_tokens": 64}, on_long_document=what)
    run_of(sequence_length=64, clean={"min_tokens": 65}, on_long_document="split")
    run_of(sequence_length=64, clean={"min_tokens": 65}, on_long_document="truncate")


def stream_of(**data: Any) -> dict[str, Any]:
    return {
        "model": {"path": "m"},
        "data": {"sources": [{"path": "a.jsonl"}], "stream": True, **data},
        "train": {"steps": 1},
        "output": "o",
    }


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"clean": {"near_duplicates": 0.8}}, "clean.near_duplicates needs the rows before"),
        ({"clean": {"exact_duplicates": True}}, "clean.exact_duplicates needs the rows before"),
        ({"clean": {"same_answer_at_most": 2}}, "clean.same_answer_at_most needs the answers before"),
        ({"holdout": 100}, "holdout as a number of rows needs all rows"),
        ({"sources": [{"path": "a", "weight": 1.0}]}, "sources.weight needs the number of tokens of each source"),
        ({"sources": [{"path": "a", "max_documents": 5}]}, "sources.max_documents needs all rows"),
    ],
)
def test_what_needs_the_whole_data_first_is_refused_with_the_reason(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        resolve(stream_of(**settings))
    assert "data.stream: false" in str(caught.value) or "stream: false" in str(caught.value)
    with pytest.raises(ConfigError, match=r"give train.steps"):
        resolve({**stream_of(), "train": {"epochs": 1}})
    resolve(stream_of(holdout=0.1, clean={"min_tokens": 3}))
