"""Evaluate one model: ask, score, report. One process; on a GPU where there is one."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bigtune.config import Data, Evaluate
from bigtune.data.formats import ReadCounts
from bigtune.errors import DataError, ModelError
from bigtune.evaluate.generate import Output, generate
from bigtune.evaluate.load import Loaded, context_of, stop_ids
from bigtune.evaluate.loss import answer_losses
from bigtune.evaluate.metrics import Metric, find_metrics
from bigtune.evaluate.prompts import PLAIN_END, Item, build_items
from bigtune.evaluate.report import Failed, Report, Sample, Score, grouped, task_of

Progress = Callable[[str, int, int], None]
TRIED = 20
"""References that a metric is tried out on."""


def evaluate(
    evaluate: Evaluate,
    data: Data,
    loaded: Loaded,
    seed: int,
    progress: Progress | None = None,
    below: int = 0,
) -> Report:
    """Score a model on held-out rows: loss of the answers, and what the metrics say of its own.

    A row whose prompt and answer (the reference, or `max_new_tokens`) exceed the model's context is left out
    of every score and counted in the report, and so is one that cannot be used where `data.on_bad_row` is skip.
    A metric that raises on a row leaves that row out of its mean, and is counted and named. Rows of `data.sources`
    with a content hash lower than `below` are held out from training, and are the questions where `evaluate` names
    none.
    `progress(stage, done, total)` is called with the stages `loss` and `generate`.

    Raises:
        ConfigError: there is no such chat template or metric.
        DataError: a source is wrong or empty, a row cannot be used, there are too few examples, no row fits the
            context, or a metric fails on every row.
        ModelError: the model does not fit its tokenizer.
    """
    started = time.perf_counter()
    metrics = find_metrics(evaluate.metrics, evaluate.code)
    model, tokenizer = loaded.model, loaded.tokenizer
    counts = ReadCounts()
    items = build_items(evaluate, data, tokenizer, seed, counts, below)
    asked = _fitting(loaded, items, evaluate.max_new_tokens)
    _try_out(metrics, asked)
    losses = answer_losses(model, asked, progress=_stage(progress, "loss", len(asked)))
    generating = time.perf_counter()
    outputs = generate(
        model,
        tokenizer,
        [item.prompt_ids for item in asked],
        stop_ids=stop_ids(loaded, [item.answer_ids for item in asked]),
        stop_text=PLAIN_END if evaluate.prompt == "plain" else "",
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        progress=_stage(progress, "generate", len(asked)),
    )
    now = time.perf_counter()
    failures: dict[str, Failed] = {}
    samples = [
        _sample(item, loss, output, _scores(metrics, item, output.text, failures))
        for item, loss, output in zip(asked, losses, outputs, strict=True)
    ]
    return Report(
        model=loaded.name,
        prompt=evaluate.prompt,
        shots=evaluate.shots,
        seed=seed,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=now - started,
        generated_tokens_per_second=sum(output.tokens for output in outputs) / (now - generating),
        rows_unusable=sum(counts.skipped.values()),
        unusable_by_reason=counts.skipped,
        rows_too_long=len(items) - len(asked),
        unstopped=sum(not output.stopped for output in outputs),
        failed=failures,
        overall=Score.of(samples, seed),
        by_task={name: Score.of(some, seed) for name, some in grouped(samples, task_of).items()},
        by_tag={name: Score.of(some, seed) for name, some in grouped(samples, lambda one: one.tags).items()},
        samples=tuple(samples),
    )


def _try_out(metrics: Mapping[str, Metric], items: Sequence[Item]) -> None:
    """Score some references against themselves: what fails on all of these would fail after a long generation."""
    for name, metric in metrics.items():
        failures: dict[str, Failed] = {}
        tried = items[:TRIED]
        for item in tried:
            _scores({name: metric}, item, item.reference, failures)
        if name in failures and failures[name].rows == len(tried):
            raise DataError(f"{failures[name].where}: evaluate.metrics: {name} fails: {failures[name].why}")


def _scores(
    metrics: Mapping[str, Metric], item: Item, output: str, failures: dict[str, Failed]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, metric in metrics.items():
        try:
            found[name] = float(metric(output, item.reference, item.values))
        except Exception as error:  # what a user's metric raises can be anything
            found[name] = None
            known = failures.get(name) or Failed(0, item.where, str(error) or type(error).__name__)
            failures[name] = replace(known, rows=known.rows + 1)
    return found


def _fitting(loaded: Loaded, items: Sequence[Item], max_new_tokens: int) -> list[Item]:
    """The items that the model has embeddings and context for."""
    highest = max(max(*item.prompt_ids, *item.answer_ids) for item in items)
    model = loaded.model
    embeddings = model.get_input_embeddings().weight.shape[0]
    if highest >= embeddings:
        raise ModelError(f"{loaded.name}: it has {embeddings} embeddings, but its tokenizer gives token {highest}")
    context = context_of(model)
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


def _stage(progress: Progress | None, name: str, total: int) -> Callable[[int], None] | None:
    return (lambda done: progress(name, done, total)) if progress else None


def _sample(item: Item, loss: float, output: Output, scores: Mapping[str, float | None]) -> Sample:
    return Sample(
        question=item.question,
        reference=item.reference,
        output=output.text,
        scores=scores,
        held_out_loss=loss / len(item.answer_ids),
        answer_tokens=len(item.answer_ids),
        task=item.task,
        tags=item.tags,
        where=item.where,
    )
