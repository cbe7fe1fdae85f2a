"""A run's training, in the order of events.

rows ─▶ begin (progress, engine) ─▶ [ batches ▶ totals ▶ micro-steps ▶ optimizer step ▶ metrics ▶ save? ]* ─▶ save
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch

from bigtune import dist
from bigtune.checkpoint.disks import find_disks
from bigtune.config import Run
from bigtune.data.collate import MicroBatch
from bigtune.data.deal import Imbalance
from bigtune.data.loader import Loader
from bigtune.data.rows import Rows
from bigtune.dist import World
from bigtune.model import token_loss
from bigtune.model.attention import describe_kernels
from bigtune.train.begin import begin
from bigtune.train.console import WorkerConsole
from bigtune.train.engine import Engine
from bigtune.train.fit import open_rows
from bigtune.train.guard import NonFinite, Watchdog
from bigtune.train.limit import TimeLimit
from bigtune.train.memory import Memory, to_gib, to_text
from bigtune.train.metrics import Flags, MetricsLog, Totals, peak_memory_gib, reduce_totals
from bigtune.train.saving import Progress, Saver
from bigtune.train.schedule import learning_rate
from bigtune.train.settle import settle_start
from bigtune.train.signals import Requests


def train(
    run: Run,
    world: World,
    resume: str | None,
    requests: Requests,
    console: WorkerConsole,
    began: float,
    cpu_adam: bool = False,
    new_data: bool = False,
) -> bool:
    """Train on this rank, from the beginning or from a checkpoint, to the last step or until asked to stop.

    Args:
        resume: "latest", "step-N" or a path; None for the latest if there is one.
        began: `time.monotonic()` at the start of the process.
        cpu_adam: whether DeepSpeed's own Adam is built.
        new_data: go on with other documents than the checkpoint's, from the next epoch on.

    Returns:
        Whether the run is done; False if it was stopped before.

    Raises:
        BigtuneError: what does not fit, cannot be written or does not go on, and what a user can do about it.
    """
    disks = find_disks(run.output / "checkpoints", world, dist.own_group())
    start = settle_start(run, resume, disks, world, dist.own_group(), console.say)
    with closing(open_rows(run, begins=start is None)) as rows:
        engine, progress, steps = begin(run, world, disks, rows, start, resume, console, cpu_adam, new_data)
        metrics = MetricsLog(run.output / "metrics.jsonl" if world.is_main else None, began, world)
        metrics.forget_after(progress.step)
        watchdog, memory = Watchdog(run.train.step_timeout_seconds, console), Memory(engine, run.train.micro_batch)
        non_finite = NonFinite(run.train.max_skipped_steps, rows, metrics, console)
        saver = Saver(run, world, disks, engine, metrics, rows, console, steps, saved_step=progress.step)
        limit = TimeLimit(began, run.train.time_limit_minutes)
        requests.let_steps_end()
        began_loop = time.monotonic()
        loader = Loader(rows, progress.position, world, run.train.micro_batch, run.train.global_batch)
        with console.bar("train") or nullcontext() as bar, loader:
            while progress.step < steps:
                with watchdog.step(progress.step + 1):
                    began_step, waited = time.monotonic(), loader.waited_seconds
                    data = loader.next()
                    late = limit.is_near(saver.expected_seconds)
                    asked = Flags(requests.stop or late, saver.wanted(requests.take_save()), saver.failed)
                    totals = reduce_totals(data.batches, asked, metrics.held)
                    metrics.complete(totals.held)
                    if totals.asked.failed:
                        saver.finish()
                    if not totals.tokens:  # the rows have ended: a step on nothing would still move the weights
                        steps = progress.step
                    if totals.asked.stop or not totals.tokens:
                        break
                    rate = learning_rate(run.optim, progress.step + 1, steps)
                    losses, applied = _learn(
                        engine, memory, data.batches, totals, rate, (run.train.seed, progress.step)
                    )
                progress = Progress(progress.step + 1, progress.skipped_steps + (not applied), data.after)
                waited = loader.waited_seconds - waited
                line = _line(progress, rows, totals, data.imbalance, rate, engine.grad_norm, applied)
                line |= _timing(metrics, engine, totals, began_step, waited) | _first_look(engine, memory, console)
                console.keep_step(**_own(data.batches, losses, line))
                metrics.hold(sum(losses), totals.weight, waited + engine.pace.take(), engine.take_aux_sum(), **line)
                non_finite.check(applied, progress.step, losses, data.rows)
                if bar:
                    bar.advance_to(progress.step, steps, _note(metrics.last))
                saver.save_if_due(progress, totals.asked.save)
                limit.note(time.monotonic() - began_step)
            saver.save(progress)
    seconds = time.monotonic() - began_loop
    waited_share, saves = loader.waited_seconds / seconds, run.checkpoint.enabled
    console.say(_ending(progress, steps, metrics.last, waited_share, rows.losses(), saves))
    return progress.step >= steps


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
    return torch.stack(losses).tolist(), applied


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


def _own(batches: Sequence[MicroBatch], losses: Sequence[float], line: Mapping[str, Any]) -> dict[str, float]:
    """What a step was on this rank, whose rows are its own."""
    weight = sum(batch.weight for batch in batches)
    return {
        "step": line["step"],
        "loss": round(sum(losses) / weight, 6) if weight else math.nan,
        "tokens": sum(batch.tokens for batch in batches),
        "grad_norm": line["grad_norm"],
        **{name: line[name] for name in ("time", "step_seconds", "data_seconds", "peak_memory_gib")},
    }


def _timing(metrics: MetricsLog, engine: Engine, totals: Totals, began: float, waited: float) -> dict[str, Any]:
    """What the clock and the memory say of a step that began at `began`; `waited` are its seconds without data."""
    seconds = time.monotonic() - began
    return {
        "time": round(metrics.elapsed(), 6),
        "step_seconds": round(seconds, 6),
        "data_seconds": round(waited, 6),
        "tokens_per_second": round(totals.tokens / seconds, 3),
        "peak_memory_gib": round(peak_memory_gib(), 4),
        "phase_seconds": {name: round(took, 6) for name, took in engine.phases.take().items()},
    }


def _first_look(engine: Engine, memory: Memory, console: WorkerConsole) -> dict[str, Any]:
    """What the first step showed of attention and memory, said and for its line; nothing later."""
    held = memory.first()
    if held:
        losses = " and ".join(sorted(token_loss.kernels_used)) or "full logits"
        layers = "; norms, positions and activations: liger" if engine.fused else ""
        ranks = "; ranks: memory that they share" if engine.own_shared_bytes else ""
        console.say(f"attention: {describe_kernels()}; loss: {losses}{layers}{ranks}")
        console.say(f"memory of a rank: {to_text(held)}")
    return to_gib(held)


def _note(last: Mapping[str, Any]) -> str:
    return f"loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s" if last else ""


def _ending(
    progress: Progress, steps: int, last: Mapping[str, Any], waited_share: float, losses: str, saves: bool
) -> str:
    if progress.step < steps:
        goes_on = "the same command goes on from there" if saves else "nothing is saved (checkpoint.enabled: false)"
        return f"train: stopped at step {progress.step} of {steps}; {goes_on}"
    if not last:
        return f"train: all {steps} steps were done already"
    line = f"train: done, {steps} steps, last loss {last['loss']:.4f}; waited for data {waited_share:.2%} of the time"
    return f"{line}; left out while streaming: {losses}" if losses else line
