"""A run's training, in the order of events.

    start? ──▶ engine ──▶ restore ──▶ [ rows ▶ totals ▶ micro-steps ▶ step ▶ metrics ▶ save? ]* ──▶ save
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtune import __version__, dist
from bigtune.checkpoint.resume import read_json, resume
from bigtune.checkpoint.save import prune, save, to_json
from bigtune.config import Run, Train
from bigtune.data.chat import DEFAULT_TEMPLATE
from bigtune.data.store import Store
from bigtune.data.stream import MicroBatch, Position, RowStream, collate, deal, steps_of
from bigtune.dist import World
from bigtune.errors import CheckpointError, DataError
from bigtune.model.load import companion_files, read_config
from bigtune.train.console import WorkerConsole
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.metrics import MetricsLog, peak_memory_gib, reduce_totals
from bigtune.train.precision import measure_precision
from bigtune.train.schedule import learning_rate
from bigtune.train.signals import StopRequest


@dataclass(slots=True)
class Progress:
    """How far the run is: the trainer's own state, and the position in the data."""

    step: int = 0
    skipped_steps: int = 0
    position: Position = Position()


def train(run: Run, world: World, start: Path | None, stop: StopRequest, console: WorkerConsole, began: float) -> None:
    """Train on this rank, from the beginning or from a checkpoint, to the last step or until asked to stop.

    Args:
        start: the checkpoint to go on from, as `find_start` gives it.
        began: `time.monotonic()` at the start of the process.

    Raises:
        BigtuneError: the model, the store or the checkpoint does not fit, or a checkpoint cannot be written.
    """
    store = Store.open(run.store)
    stream = RowStream(store, run.data.sequence_length, run.train.seed, run.train.epochs)
    steps = run.train.steps or steps_of(stream, run.train.epochs or 1, run.train.global_batch)
    precision = _precision(run.train, start)
    ds_config = complete(read_preset(run.deepspeed), run, precision, read_config(run.model.path).hidden_size)
    if world.is_main:
        (run.output / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        (run.output / "deepspeed.json").write_text(to_json(ds_config), encoding="utf-8")
    console.say(_headline(run, world, steps, precision, stream))
    engine = Engine(run.model.path, run.optim, ds_config, precision, world)
    progress = _restore(start, engine, world, store, console) if start else Progress()
    metrics = MetricsLog(run.output / "metrics.jsonl" if world.is_main else None, began)
    metrics.forget_after(progress.step)

    def checkpoint() -> None:
        metrics.complete(dist.all_sum([loss_sum])[0])
        save(
            run.output / "checkpoints", progress.step, engine, world,
            _texts(run, progress, steps, precision, store), _model_files(run, store),
        )  # fmt: skip
        if world.is_main and run.checkpoint.keep_last:
            prune(run.output / "checkpoints", run.checkpoint.keep_last)

    loss_sum, saved_step = 0.0, progress.step
    bar = console.bar("train")
    stop.can_wait = True
    with bar or _Nothing():
        while progress.step < steps:
            began_step = time.monotonic()
            rows, after = stream.take(progress.position, run.train.global_batch)
            dealt = deal(rows, world.data_rank, world.data_world, run.train.micro_batch, run.train.global_batch)
            batches = [collate(part) for part in dealt]
            totals = reduce_totals(
                sum(batch.supervised for batch in batches), sum(batch.tokens for batch in batches), stop.asked, loss_sum
            )
            metrics.complete(totals.loss)
            if totals.stop:
                loss_sum = 0.0
                break
            rate = learning_rate(run.optim, progress.step + 1, steps)
            loss_sum = _backward(engine, batches, totals.supervised, run.train.seed, progress.step, world)
            applied = engine.step(rate)
            progress = Progress(progress.step + 1, progress.skipped_steps + (not applied), after)
            seconds = time.monotonic() - began_step
            metrics.hold(
                {
                    "step": progress.step,
                    "epoch": round(stream.epochs_at(after), 6),
                    "loss": None,
                    "learning_rate": rate,
                    "grad_norm": engine.grad_norm,
                    "tokens": totals.tokens,
                    "supervised_tokens": totals.supervised,
                    "time": round(metrics.elapsed(), 6),
                    "step_seconds": round(seconds, 6),
                    "tokens_per_second": round(totals.tokens / seconds, 3),
                    "peak_memory_gib": round(peak_memory_gib(), 4),
                    "skipped": not applied,
                }
            )
            if bar:
                bar.advance_to(progress.step, steps, _note(metrics.last))
            if run.checkpoint.every_steps and progress.step % run.checkpoint.every_steps == 0:
                checkpoint()
                loss_sum, saved_step = 0.0, progress.step
        if progress.step > saved_step:
            checkpoint()
    if progress.step < steps:
        console.say(f"stopped at step {progress.step} of {steps}; the same command goes on from there")
    elif metrics.last:
        console.say(f"trained {steps} steps; last loss {metrics.last['loss']:.4f}")


def _precision(section: Train, start: Path | None) -> str:
    """The run file's precision; for `auto` that of the checkpoint, or rank 0's measurement."""
    if section.precision != "auto":
        return section.precision
    if start is not None:
        return str(read_json(start, "trainer.json").get("precision"))
    fast = measure_precision() == "bfloat16"
    return "bfloat16" if dist.from_main(float(fast)) else "float32"


def _headline(run: Run, world: World, steps: int, precision: str, stream: RowStream) -> str:
    return (
        f"train: {steps} steps of {run.train.global_batch} rows of {run.data.sequence_length} tokens "
        f"({stream.efficiency:.1%} full) on {world.world_size} ranks, {dist.device().type}, {precision}, "
        f"{torch.get_num_threads()} threads a rank"
    )


def _backward(
    engine: Engine, batches: list[MicroBatch], supervised: int, seed: int, step: int, world: World
) -> float:
    """All micro-steps of one step; returns this rank's summed loss."""
    losses = []
    for index, batch in enumerate(batches):
        # Dropout, where a model has it, depends on the place in the run alone.
        torch.manual_seed(hash((seed, step, index * world.data_world + world.data_rank)) % 2**63)
        losses.append(engine.micro_step(batch, supervised, last=index == len(batches) - 1))
    return float(torch.stack(losses).double().sum())


def _restore(start: Path, engine: Engine, world: World, store: Store, console: WorkerConsole) -> Progress:
    """The engine's state into the engine, and the rest."""
    trainer, data = read_json(start, "trainer.json"), read_json(start, "data.json")
    if data.get("fingerprint") != store.fingerprint:
        raise DataError(
            f"{start}: was trained on other documents than {store.path} holds now; "
            "bring the sources back, or start in another output with model.path set to the merged checkpoint"
        )
    resume(start, engine, world)
    console.say(f"going on from {start}")
    try:
        return Progress(trainer["step"], trainer["skipped_steps"], Position.from_json(data))
    except KeyError as error:
        raise CheckpointError(f"{start}/trainer.json: lacks {error}; resume from another step") from None


def _texts(run: Run, progress: Progress, steps: int, precision: str, store: Store) -> dict[str, str]:
    import deepspeed
    import transformers

    trainer = {
        "step": progress.step,
        "steps": steps,
        "skipped_steps": progress.skipped_steps,
        "precision": precision,
        "versions": {
            "bigtune": __version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
    }
    data = {
        **progress.position.to_json(),
        "seed": run.train.seed,
        "sequence_length": run.data.sequence_length,
        "fingerprint": store.fingerprint,
    }
    return {"trainer.json": to_json(trainer), "data.json": to_json(data), "run.yaml": run.to_yaml()}


def _model_files(run: Run, store: Store) -> Mapping[str, Path | str]:
    """What makes a model of the weights; with the default template, where that is what was learnt."""
    files: dict[str, Path | str] = dict(companion_files(run.model.path))
    if store.manifest.template == "default":
        files["chat_template.jinja"] = DEFAULT_TEMPLATE
    return files


def _note(last: Mapping[str, Any]) -> str:
    return f"loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s" if last else ""


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
