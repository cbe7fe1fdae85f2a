"""A run's training, in the order of events.

engine ──▶ restore ──▶ [ rows ▶ totals ▶ micro-steps ▶ optimizer step ▶ metrics ▶ save? ]* ──▶ save
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.checkpoint.layout import point_at, read_json
from bigtune.checkpoint.save import to_json
from bigtune.config import Run, Train
from bigtune.data.store import Store
from bigtune.data.stream import MicroBatch, Position, RowStream, collate, deal, steps_of
from bigtune.dist import World
from bigtune.errors import CheckpointError, DataError
from bigtune.model.load import read_config
from bigtune.train.console import WorkerConsole
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.fit import check_fit
from bigtune.train.metrics import MetricsLog, peak_memory_gib, reduce_totals
from bigtune.train.precision import measure_precision
from bigtune.train.saving import Progress, Saver
from bigtune.train.schedule import learning_rate
from bigtune.train.signals import StopRequest
from bigtune.train.state import restore


def train(
    run: Run,
    world: World,
    start: Path | None,
    stop: StopRequest,
    console: WorkerConsole,
    began: float,
    cpu_adam: bool = False,
) -> None:
    """Train on this rank, from the beginning or from a checkpoint, to the last step or until asked to stop.

    Args:
        start: the checkpoint to go on from, as `find_start` gives it.
        began: `time.monotonic()` at the start of the process.
        cpu_adam: whether DeepSpeed's own Adam is built.

    Raises:
        BigtuneError: the model, the store or the checkpoint does not fit, or a checkpoint cannot be written.
    """
    store = Store.open(run.store)
    stream = RowStream(store, run.data.sequence_length, run.train.seed, run.train.epochs)
    steps = run.train.steps or steps_of(stream, run.train.epochs or 1, run.train.global_batch)
    precision = _precision(run.train, start)
    ds_config = _settle(run, precision, store, world)
    console.say(_headline(run, world, steps, precision, stream))
    engine = Engine(run.model.path, run.optim, ds_config, precision, world, cpu_adam)
    progress = _go_on(start, engine, store, console) if start else Progress()
    metrics = MetricsLog(run.output / "metrics.jsonl" if world.is_main else None, began)
    metrics.forget_after(progress.step)
    saver = Saver(run, world, engine, metrics, store, steps, saved_step=progress.step)
    stop.can_wait = True
    with console.bar("train") or nullcontext() as bar:
        while progress.step < steps:
            began_step = time.monotonic()
            rows, after = stream.take(progress.position, run.train.global_batch)
            dealt = deal(rows, world.data_rank, world.data_world, run.train.micro_batch, run.train.global_batch)
            batches = [collate(part) for part in dealt]
            totals = reduce_totals(batches, stop.asked, metrics.held_loss)
            metrics.complete(totals.loss)
            if totals.stop:
                break
            rate = learning_rate(run.optim, progress.step + 1, steps)
            loss = _backward(engine, batches, totals.supervised, (run.train.seed, progress.step), world)
            applied = engine.step(rate)
            progress = Progress(progress.step + 1, progress.skipped_steps + (not applied), after)
            seconds = time.monotonic() - began_step
            metrics.hold(
                loss,
                step=progress.step,
                epoch=round(stream.epochs_at(after), 6),
                loss=None,
                learning_rate=rate,
                grad_norm=engine.grad_norm,
                tokens=totals.tokens,
                supervised_tokens=totals.supervised,
                time=round(metrics.elapsed(), 6),
                step_seconds=round(seconds, 6),
                tokens_per_second=round(totals.tokens / seconds, 3),
                peak_memory_gib=round(peak_memory_gib(), 4),
                skipped=not applied,
            )
            if bar:
                bar.advance_to(progress.step, steps, _note(metrics.last))
            saver.save_if_due(progress)
        saver.save(progress)
    console.say(_ending(progress, steps, metrics.last))


def _settle(run: Run, precision: str, store: Store, world: World) -> dict[str, Any]:
    """The DeepSpeed configuration of a run whose model and documents fit; written down beside the run file."""
    model_config = read_config(run.model.path)
    check_fit(model_config, store)
    ds_config = complete(read_preset(run.deepspeed), run, precision, model_config.hidden_size)
    if world.is_main:
        (run.output / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        (run.output / "deepspeed.json").write_text(to_json(ds_config), encoding="utf-8")
    return ds_config


def _precision(section: Train, start: Path | None) -> str:
    """The run file's precision; for `auto` that of the checkpoint, or rank 0's measurement."""
    if section.precision != "auto":
        return section.precision
    if start is not None:
        return str(read_json(start, "trainer.json").get("precision"))
    fast = measure_precision() == "bfloat16"
    return "bfloat16" if dist.from_main(float(fast)) else "float32"


def _backward(
    engine: Engine, batches: Sequence[MicroBatch], supervised: int, place: tuple[int, int], world: World
) -> float:
    """All micro-steps of one step; returns this rank's summed loss."""
    losses = []
    for index, batch in enumerate(batches):
        # Dropout, where a model has it, depends on (seed, step, row) alone; integers hash the same everywhere.
        torch.manual_seed(hash((*place, index * world.data_world + world.data_rank)) % 2**63)
        losses.append(engine.micro_step(batch, supervised, last=index == len(batches) - 1))
    return float(torch.stack(losses).double().sum())


def _go_on(start: Path, engine: Engine, store: Store, console: WorkerConsole) -> Progress:
    """The engine's state into the engine; the trainer's and the data's as progress."""
    trainer, data = read_json(start, "trainer.json"), read_json(start, "data.json")
    if data.get("fingerprint") != store.fingerprint:
        raise DataError(
            f"{start}: was trained on other documents than {store.path} holds now; "
            "bring the sources back, or start in another output with model.path set to the merged checkpoint"
        )
    restore(engine, start)
    console.say(f"going on from {start}")
    if console.world.is_main and start.parent == console.output / "checkpoints":
        point_at(start)  # where it goes back to an earlier step, the later ones are no longer this run's
    try:
        return Progress(trainer["step"], trainer["skipped_steps"], Position.from_json(data))
    except KeyError as error:
        raise CheckpointError(f"{start}/trainer.json: lacks {error}; resume from another step") from None


def _headline(run: Run, world: World, steps: int, precision: str, stream: RowStream) -> str:
    ranks = f"{world.world_size} ranks" if world.world_size > 1 else "1 rank"
    threads = torch.get_num_threads()
    return (
        f"train: {steps} steps of {run.train.global_batch} rows of {run.data.sequence_length} tokens "
        f"({stream.efficiency:.1%} full) on {ranks}, {dist.device().type}, {precision}, "
        f"{threads} thread{'s' if threads > 1 else ''} a rank"
    )


def _note(last: Mapping[str, Any]) -> str:
    return f"loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s" if last else ""


def _ending(progress: Progress, steps: int, last: Mapping[str, Any]) -> str:
    if progress.step < steps:
        return f"train: stopped at step {progress.step} of {steps}; the same command goes on from there"
    if not last:
        return f"train: all {steps} steps were done already"
    return f"train: done, {steps} steps, last loss {last['loss']:.4f}"
