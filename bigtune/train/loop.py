"""A run's training, in the order of events.

rows ─▶ progress ─▶ engine ─▶ restore ─▶ [ batches ▶ totals ▶ micro-steps ▶ optimizer step ▶ metrics ▶ save? ]* ─▶ save
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.checkpoint.layout import point_at, read_json
from bigtune.checkpoint.save import to_json
from bigtune.config import Run, Train
from bigtune.data.collate import MicroBatch
from bigtune.data.deal import Imbalance
from bigtune.data.loader import Loader
from bigtune.data.rows import Position, Rows
from bigtune.data.stream import RowStream, steps_of
from bigtune.dist import World
from bigtune.errors import CheckpointError, DataError
from bigtune.model import token_loss
from bigtune.model.attention import describe_kernels
from bigtune.model.load import read_config
from bigtune.model.vocabulary import Vocabulary, vocabulary_of
from bigtune.runfile import to_yaml
from bigtune.train.console import WorkerConsole
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.fit import check_fit, open_rows
from bigtune.train.guard import NonFinite, Watchdog
from bigtune.train.memory import Memory, to_gib, to_text
from bigtune.train.metrics import MetricsLog, Totals, peak_memory_gib, reduce_totals
from bigtune.train.precision import measure_precision
from bigtune.train.probe import prove
from bigtune.train.saving import Progress, Saver
from bigtune.train.schedule import learning_rate
from bigtune.train.signals import StopRequest
from bigtune.train.state import restore
from bigtune.train.support import check


def train(
    run: Run,
    world: World,
    start: Path | None,
    stop: StopRequest,
    console: WorkerConsole,
    began: float,
    cpu_adam: bool = False,
    new_data: bool = False,
) -> None:
    """Train on this rank, from the beginning or from a checkpoint, to the last step or until asked to stop.

    Args:
        start: the checkpoint to go on from, as `find_start` gives it.
        began: `time.monotonic()` at the start of the process.
        cpu_adam: whether DeepSpeed's own Adam is built.
        new_data: go on with other documents than the checkpoint's, from the next epoch on.

    Raises:
        BigtuneError: what does not fit, cannot be written or does not go on, and what a user can do about it.
    """
    with closing(open_rows(run, begins=start is None)) as rows:
        progress = _read_progress(start, rows, run.train, new_data, console) if start else Progress()
        steps = _last_step(run.train, rows, progress)
        precision = _precision(run.train, start)
        vocabulary = vocabulary_of(run.model, run.output)
        ds_config = _settle(run, vocabulary, start, precision, rows, world)
        console.say(_headline(run, world, steps, precision, rows))
        engine = _engine(run, vocabulary, ds_config, precision, world, cpu_adam, start, rows, console)
        metrics = MetricsLog(run.output / "metrics.jsonl" if world.is_main else None, began, world)
        metrics.forget_after(progress.step)
        watchdog, memory = Watchdog(run.train.step_timeout_seconds, console), Memory(engine, run.train.micro_batch)
        non_finite = NonFinite(run.train.max_skipped_steps, rows, metrics, console)
        saver = Saver(run, world, engine, metrics, rows, steps, saved_step=progress.step)
        stop.can_wait, began_loop = True, time.monotonic()
        loader = Loader(rows, progress.position, world, run.train.micro_batch, run.train.global_batch)
        with console.bar("train") or nullcontext() as bar, loader:
            while progress.step < steps:
                with watchdog.step(progress.step + 1):
                    began_step, waited = time.monotonic(), loader.waited_seconds
                    data = loader.next()
                    totals = reduce_totals(data.batches, stop.asked, metrics.held)
                    metrics.complete(totals.held)
                    if not totals.tokens:  # the rows have ended: a step on nothing would still move the weights
                        steps = progress.step
                    if totals.stop or not totals.tokens:
                        break
                    rate = learning_rate(run.optim, progress.step + 1, steps)
                    place = (run.train.seed, progress.step)
                    losses, applied = _learn(engine, memory, data.batches, totals, rate, place)
                progress = Progress(progress.step + 1, progress.skipped_steps + (not applied), data.after)
                waited = loader.waited_seconds - waited
                line = _line(progress, rows, totals, data.imbalance, rate, engine.grad_norm, applied)
                line |= _timing(metrics, totals, began_step, waited) | _first_look(memory, console)
                metrics.hold(sum(losses), totals.weight, waited + engine.pace.take(), engine.take_aux_sum(), **line)
                non_finite.check(applied, progress.step, losses, data.rows)
                if bar:
                    bar.advance_to(progress.step, steps, _note(metrics.last))
                saver.save_if_due(progress)
            saver.save(progress)
    seconds = time.monotonic() - began_loop
    console.say(_ending(progress, steps, metrics.last, loader.waited_seconds / seconds, rows.losses()))


def _read_progress(start: Path, rows: Rows, section: Train, new_data: bool, console: WorkerConsole) -> Progress:
    """Where a checkpoint ended; with other rows than it was trained on, before the first epoch that it had not begun.

    Raises:
        CheckpointError: the trainer's or the data's JSON is missing or broken.
        DataError: the rows are other ones and not asked for, or come after the last epoch.
    """
    trainer, data = read_json(start, "trainer.json"), read_json(start, "data.json")
    try:
        progress = Progress(trainer["step"], trainer["skipped_steps"], Position.from_json(data))
    except KeyError as error:
        raise CheckpointError(f"{start}/trainer.json: lacks {error}; resume from another step") from None
    if data.get("fingerprint") == rows.fingerprint:
        return progress
    if not new_data:
        raise DataError(
            f"{start}: was trained on other rows than data gives now; bring the sources and settings back, or go "
            "on with --new-data: the next epoch then begins with the new ones"
        )
    ended = progress.position
    begins = ended if ended == Position(ended.epoch) else Position(ended.epoch + 1)
    progress = replace(progress, position=begins)
    if _last_step(section, rows, progress) <= progress.step:
        key, number = ("epochs", section.epochs) if section.epochs else ("steps", section.steps)
        raise DataError(f"--new-data: {start} leaves nothing of {key}: {number} for the new ones; raise train.{key}")
    console.say(f"the documents are other ones than in {start}: epoch {begins.epoch} begins with them")
    return progress


def _last_step(section: Train, rows: Rows, progress: Progress) -> int:
    """The run's last step: as given, or the one that reads the last epoch's last row."""
    if section.steps is not None:
        return section.steps
    assert isinstance(rows, RowStream)  # the run file gives a stream of raw files its steps
    return progress.step + steps_of(rows, section.epochs or 1, section.global_batch, progress.position)


def _settle(
    run: Run, vocabulary: Vocabulary, start: Path | None, precision: str, rows: Rows, world: World
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run whose parts go together; written down beside the run file."""
    preset = read_preset(run.deepspeed)
    check(run, preset, start, world.world_size)
    model_config = read_config(vocabulary.folder)
    check_fit(model_config, rows)
    ds_config = complete(preset, run, precision, model_config.hidden_size)
    if world.is_main:
        (run.output / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
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


def _engine(
    run: Run,
    vocabulary: Vocabulary,
    ds_config: dict[str, Any],
    precision: str,
    world: World,
    cpu_adam: bool,
    start: Path | None,
    rows: Rows,
    console: WorkerConsole,
) -> Engine:
    """The model, proven, and with the state of a checkpoint where the run goes on from one."""
    recompute = run.train.activation_checkpointing
    engine = Engine(
        run.model.path, run.optim, ds_config, precision, world, cpu_adam, run.loss, recompute,
        run.adapter, vocabulary, run.train.seed,
    )  # fmt: skip
    for addition in _additions(engine, vocabulary):
        console.say(addition)
    prove(engine, rows.longest()[0], console.say)
    if start is not None:
        restore(engine, start)
        console.say(f"going on from {start}")
        if world.is_main and start.parent == console.output / "checkpoints":
            point_at(start)  # where it goes back to an earlier step, the later ones are no longer this run's
    return engine


def _learn(
    engine: Engine,
    memory: Memory,
    batches: Sequence[MicroBatch],
    totals: Totals,
    rate: float,
    place: tuple[int, int],
) -> tuple[list[float], bool]:
    """One step; returns the summed loss of each of this rank's micro-batches, and whether the step was applied."""
    world, losses = engine.world, []
    for index, batch in enumerate(batches):
        # Dropout, where a model has it, depends on (seed, step, row) alone; integers hash the same everywhere.
        torch.manual_seed(hash((*place, index * world.data_world + world.data_rank)) % 2**63)
        with memory.micro_step(batch):
            losses.append(engine.micro_step(batch, totals.weight, totals.tokens, last=index == len(batches) - 1))
    with memory.optimizer_step():
        applied = engine.step(rate)
    return [float(loss) for loss in torch.stack(losses).tolist()], applied


def _line(
    progress: Progress, rows: Rows, totals: Totals, dealt: Imbalance, rate: float, grad_norm: float, applied: bool
) -> dict[str, Any]:
    """What a step computed, for metrics.jsonl; the same in every run that computes it."""
    return {
        "step": progress.step,
        "epoch": round(rows.epochs_at(progress.position), 6),
        "loss": None,  # known with the next step's totals
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens": totals.tokens,
        "supervised_tokens": totals.supervised,
        "work_imbalance": round(dealt.work, 4),
        "supervised_imbalance": round(dealt.supervised, 4),
        "skipped": not applied,
    }


def _timing(metrics: MetricsLog, totals: Totals, began: float, waited: float) -> dict[str, float]:
    """What the clock and the memory say of a step that began at `began`; `waited` are its seconds without data."""
    seconds = time.monotonic() - began
    return {
        "time": round(metrics.elapsed(), 6),
        "step_seconds": round(seconds, 6),
        "data_seconds": round(waited, 6),
        "tokens_per_second": round(totals.tokens / seconds, 3),
        "peak_memory_gib": round(peak_memory_gib(), 4),
    }


def _first_look(memory: Memory, console: WorkerConsole) -> dict[str, Any]:
    """What the first step showed of attention and memory, said and for its line; nothing later."""
    held = memory.first()
    if held:
        losses = " and ".join(sorted(token_loss.kernels_used)) or "full logits"
        console.say(f"attention: {describe_kernels()}; loss: {losses}")
        console.say(f"memory of a rank: {to_text(held)}")
    return to_gib(held)


def _headline(run: Run, world: World, steps: int, precision: str, rows: Rows) -> str:
    ranks = f"{world.world_size} ranks" if world.world_size > 1 else "1 rank"
    threads = torch.get_num_threads()
    return (
        f"train: {steps} steps of {run.train.global_batch} {rows.describe()} "
        f"on {ranks}, {dist.device().type}, {precision}, "
        f"{threads} thread{'s' if threads > 1 else ''} a rank"
    )


def _additions(engine: Engine, vocabulary: Vocabulary) -> Iterator[str]:
    """What the run adds to the model, for the head of a run."""
    if engine.adapted:
        trained, whole = engine.sizes()
        layers = len(engine.adapted.folds)
        yield f"adapter: on {layers:,} layers; {trained:,} of {whole:,} parameters ({trained / whole:.2%}) are trained"
    if vocabulary.new_rows:
        yield f"new tokens: {len(vocabulary.new_rows)}, rows {vocabulary.new_rows.start:,} on of the embeddings"


def _note(last: Mapping[str, Any]) -> str:
    return f"loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s" if last else ""


def _ending(progress: Progress, steps: int, last: Mapping[str, Any], waited_share: float, losses: str) -> str:
    if progress.step < steps:
        return f"train: stopped at step {progress.step} of {steps}; the same command goes on from there"
    if not last:
        return f"train: all {steps} steps were done already"
    line = f"train: done, {steps} steps, last loss {last['loss']:.4f}; waited for data {waited_share:.2%} of the time"
    return f"{line}; left out while streaming: {losses}" if losses else line
