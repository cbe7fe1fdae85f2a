"""Evaluate one model folder: load, ask, score, report. One process; on a GPU where there is one."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bigtune.config import Data, Evaluate
from bigtune.data.chat import load_tokenizer
from bigtune.data.formats import ReadCounts
from bigtune.errors import DataError, ModelError
from bigtune.evaluate.generate import Output, generate
from bigtune.evaluate.loss import answer_losses
from bigtune.evaluate.prompts import PLAIN_END, Item, build_items
from bigtune.evaluate.report import Report, Sample, Score, scores_by
from bigtune.evaluate.score import is_right, last_number
from bigtune.progress import without_library_bars

Progress = Callable[[str, int, int], None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def evaluate(
    evaluate: Evaluate,
    data: Data,
    model_path: Path,
    seed: int,
    progress: Progress | None = None,
    dtype: str | None = None,
    below: int = 0,
    trusted: bool = False,
) -> Report:
    """Score a Hugging Face model folder on held-out rows: loss of the answers, and exact match.

    A row whose prompt and answer (the reference, or `max_new_tokens`) exceed the model's context is left out
    of every score and counted in the report, and so is one that cannot be used where `data.on_bad_row` is skip.
    `dtype` is float32 or bfloat16; by default bfloat16 on CUDA and float32 elsewhere. Rows of `data.sources` with
    a content hash lower than `below` are held out from training, and are the questions where `evaluate` names none.
    Code of the model's folder runs where it is `trusted`.
    `progress(stage, done, total)` is called with the stages `loss` and `generate`.

    Raises:
        ConfigError: there is no such chat template.
        DataError: a source is wrong or empty, a row cannot be used, there are too few examples, or no row fits the
            context.
        ModelError: the folder is missing, is no Hugging Face model, or does not fit its tokenizer.
    """
    started = time.perf_counter()
    _check_folder(model_path)
    tokenizer = load_tokenizer(model_path)
    counts = ReadCounts()
    items = build_items(evaluate, data, tokenizer, seed, counts, below)
    if evaluate.answer == "number":
        _check_numbers(items)
    model = load_model(model_path, dtype, trusted)
    asked = _fitting(model, items, evaluate.max_new_tokens)
    losses = answer_losses(model, asked, progress=_stage(progress, "loss", len(asked)))
    generating = time.perf_counter()
    outputs = generate(
        model,
        tokenizer,
        [item.prompt_ids for item in asked],
        stop_ids=_stop_ids(model, tokenizer, asked),
        stop_text=PLAIN_END if evaluate.prompt == "plain" else "",
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        progress=_stage(progress, "generate", len(asked)),
    )
    now = time.perf_counter()
    samples = [
        _sample(item, loss, output, is_right(output.text, item.reference, evaluate.answer))
        for item, loss, output in zip(asked, losses, outputs, strict=True)
    ]
    return Report(
        model=str(model_path),
        prompt=evaluate.prompt,
        shots=evaluate.shots,
        answer=evaluate.answer,
        seed=seed,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=now - started,
        generated_tokens_per_second=sum(output.tokens for output in outputs) / (now - generating),
        rows_unusable=sum(counts.skipped.values()),
        unusable_by_reason=counts.skipped,
        rows_too_long=len(items) - len(asked),
        overall=Score.of(samples),
        by_task=scores_by(samples, lambda sample: (sample.task,) if sample.task else ()),
        by_tag=scores_by(samples, lambda sample: sample.tags),
        samples=tuple(samples),
    )


def load_model(path: Path, dtype: str | None = None, trusted: bool = False) -> Any:
    """Load a causal language model for inference, on CUDA where available. Nothing is downloaded.

    Raises:
        ModelError: the folder is missing, is no Hugging Face model, or cannot be read as one.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in _DTYPES:
        raise ModelError(f"dtype is '{dtype}'; allowed: {', '.join(_DTYPES)}")
    try:
        with without_library_bars():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=_DTYPES[dtype], local_files_only=True, trust_remote_code=trusted
            )
    except Exception as error:
        # transformers raises nearly every kind of error for a folder that is damaged or of an unknown model
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{path}: the model cannot be loaded: {reason}") from error
    return model.to(device).eval()


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder")
    if (path / "layout.json").is_file():
        raise ModelError(f"{path}: a training checkpoint, not a model; run `bigtune merge` on it first")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path}: an adapter, not a whole model; run `bigtune merge` without --adapter first")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no Hugging Face model folder (it has no config.json)")


def _check_numbers(items: Iterable[Item]) -> None:
    for item in items:
        if last_number(item.reference) is None:
            raise DataError(f"{item.where}: evaluate.answer is 'number', but the reference answer holds none")


def _fitting(model: Any, items: Sequence[Item], max_new_tokens: int) -> list[Item]:
    """The items that the model has embeddings and context for."""
    highest = max(max(*item.prompt_ids, *item.answer_ids) for item in items)
    embeddings = model.get_input_embeddings().weight.shape[0]
    if highest >= embeddings:
        raise ModelError(
            f"{model.name_or_path}: it has {embeddings} embeddings, but its tokenizer gives token {highest}"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return list(items)
    needs = [len(item.prompt_ids) + max(len(item.answer_ids), max_new_tokens) for item in items]
    fitting = [item for item, need in zip(items, needs, strict=True) if need <= context]
    if not fitting:
        raise DataError(
            f"no row fits: the shortest takes {min(needs)} tokens with evaluate.max_new_tokens "
            f"({max_new_tokens}), and the model's context is {context}; lower it, or evaluate.shots"
        )
    return fitting


def _stop_ids(model: Any, tokenizer: Any, items: Iterable[Item]) -> set[int]:
    """Tokens that end an answer: the model's and its tokenizer's, and the template's end of a turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends: set[int] = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for item in items:
        # Backwards, since templates put a line end behind the token that ends a turn.
        ends.update([token for token in reversed(item.answer_ids) if token in special][:1])
    return ends


def _stage(progress: Progress | None, name: str, total: int) -> Callable[[int], None] | None:
    return (lambda done: progress(name, done, total)) if progress else None


def _sample(item: Item, loss: float, output: Output, correct: bool) -> Sample:
    return Sample(
        question=item.question,
        reference=item.reference,
        output=output.text,
        correct=correct,
        held_out_loss=loss / len(item.answer_ids),
        answer_tokens=len(item.answer_ids),
        task=item.task,
        tags=item.tags,
        where=item.where,
    )
