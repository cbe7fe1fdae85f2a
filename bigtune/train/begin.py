"""What a run begins with, on every rank: how far it is, its last step, and the model, proven and in the state of a
checkpoint where it goes on from one.

rows, checkpoint ─▶ progress ─▶ DeepSpeed's configuration ─▶ engine ─▶ prove ─▶ restore
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.checkpoint.disks import Disks
from bigtune.checkpoint.folder import clear_remains, point_at, read_json, to_json
from bigtune.config import Run, Train
from bigtune.data.rows import Position, Rows
from bigtune.data.stream import RowStream, steps_of
from bigtune.dist import World
from bigtune.errors import CheckpointError, DataError
from bigtune.model.load import read_config
from bigtune.model.shards import named
from bigtune.model.vocabulary import Vocabulary, vocabulary_of
from bigtune.runfile import to_yaml
from bigtune.train.console import WorkerConsole
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.fit import check_fit
from bigtune.train.precision import measure_precision
from bigtune.train.probe import prove
from bigtune.train.saving import Progress
from bigtune.train.start import changes_since
from bigtune.train.state import restore
from bigtune.train.support import check


def begin(
    run: Run,
    world: World,
    disks: Disks,
    rows: Rows,
    start: Path | None,
    resume: str | None,
    console: WorkerConsole,
    cpu_adam: bool = False,
    new_data: bool = False,
) -> tuple[Engine, Progress, int]:
    """The model, how far the run is, and its last step.

    Args:
        start: the checkpoint to go on from, if any.
        resume: how the user named it, if he did.
        cpu_adam: whether DeepSpeed's own Adam is built.
        new_data: go on with other documents than the checkpoint's, from the next epoch on.

    Raises:
        BigtuneError: the model, the documents, the settings or the checkpoint do not fit each other.
    """
    changes = changes_since(run, start, resume is not None, new_data) if start else []
    progress = _read_progress(start, rows, run.train, new_data, console) if start else Progress()
    steps = _last_step(run.train, rows, progress)
    precision = _precision(run.train, start)
    vocabulary = vocabulary_of(run.model, run.output)
    ds_config = _settle(run, vocabulary, precision, rows, world)
    console.say(_headline(run, world, steps, precision, rows))
    engine = _engine(run, vocabulary, ds_config, precision, world, cpu_adam)
    for addition in _additions(engine, vocabulary):
        console.say(addition)
    prove(engine, rows.longest()[0], console.say)
    writes = disks.writer[world.rank] == world.rank
    if start:
        moved = restore(engine, start, disks, dist.own_group())
        console.say(_going_on(start, moved, changes))
        if writes and start.parent == console.output / "checkpoints":
            point_at(start)  # where it goes back to an earlier step, the later ones are no longer this run's
    if writes:
        clear_remains(run.output / "checkpoints")
    if not disks.shared:
        console.say(_who_holds_what(disks, run.checkpoint.replicas))
    return engine, progress, steps


def _going_on(start: Path, moved: int, changes: list[str]) -> str:
    brought = f", of which {moved / 2**30:.2f} GiB came from other hosts" if moved else ""
    return f"going on from {start}{brought}" + (f", with other settings: {'; '.join(changes)}" if changes else "")


def _who_holds_what(disks: Disks, replicas: int) -> str:
    hosts = f"checkpoint: {len(disks.names)} hosts without shared storage, each with its ranks' shards"
    if replicas:
        return f"{hosts} and a neighbour's"
    return f"{hosts} alone: a host that dies takes them with it; checkpoint.replicas: 1 copies them to a neighbour"


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


def _precision(section: Train, start: Path | None) -> str:
    """The run file's precision; for `auto` that of the checkpoint, or rank 0's measurement."""
    if section.precision != "auto":
        return section.precision
    if start is not None:
        return str(read_json(start, "trainer.json").get("precision"))
    fast = measure_precision() == "bfloat16"
    return "bfloat16" if dist.from_main(float(fast)) else "float32"


def _settle(run: Run, vocabulary: Vocabulary, precision: str, rows: Rows, world: World) -> dict[str, Any]:
    """The DeepSpeed configuration of a run whose parts go together; written down beside the run file."""
    preset = read_preset(run.deepspeed)
    check(run, preset)
    model_config = read_config(vocabulary.folder, vocabulary.trusted)
    check_fit(model_config, rows)
    ds_config = complete(preset, run, precision, model_config.hidden_size)
    if world.is_main:
        (run.output / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
        (run.output / "deepspeed.json").write_text(to_json(ds_config), encoding="utf-8")
    return ds_config


def _headline(run: Run, world: World, steps: int, precision: str, rows: Rows) -> str:
    ranks = f"{world.world_size} ranks" if world.world_size > 1 else "1 rank"
    threads = torch.get_num_threads()
    return (
        f"train: {steps} steps of {run.train.global_batch} {rows.describe()} "
        f"on {ranks}, {dist.device().type}, {precision}, "
        f"{threads} thread{'s' if threads > 1 else ''} a rank"
    )


def _engine(
    run: Run, vocabulary: Vocabulary, ds_config: dict[str, Any], precision: str, world: World, cpu_adam: bool
) -> Engine:
    """The model on its ranks."""
    return Engine(
        run.model.path, run.optim, ds_config, precision, world, cpu_adam, run.loss,
        run.train.activation_checkpointing, run.adapter, vocabulary, run.train.seed,
    )  # fmt: skip


def _additions(engine: Engine, vocabulary: Vocabulary) -> Iterator[str]:
    """What the run adds to the model, or leaves out of it, for the head of a run."""
    if engine.adapted:
        trained, whole = engine.sizes()
        layers = len(engine.adapted.folds)
        yield f"adapter: on {layers:,} layers; {trained:,} of {whole:,} parameters ({trained / whole:.2%}) are trained"
    if vocabulary.new_rows:
        yield f"new tokens: {len(vocabulary.new_rows)}, rows {vocabulary.new_rows.start:,} on of the embeddings"
    if engine.unexpected:
        yield (
            f"not in the model: {len(engine.unexpected):,} of the tensors in its files, which are neither trained nor "
            f"in the merged model: {named(engine.unexpected)}"
        )
