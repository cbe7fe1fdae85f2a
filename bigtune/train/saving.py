"""When a run is saved, and what goes into its checkpoints beside the shards.

state ─▶ copy ─▶ thread: write, rename, latest ─▶ prune
         the training goes on here
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as serialize

from bigtune import __version__, dist
from bigtune.checkpoint import base
from bigtune.checkpoint.disks import Disks
from bigtune.checkpoint.folder import read_json, remove, step_folder, steps_in, to_json
from bigtune.checkpoint.layout import BUFFERS, Layout
from bigtune.checkpoint.save import Where, save, to_prune
from bigtune.config import Run
from bigtune.data.heldout import packed_held_out
from bigtune.data.rows import Position, Row, Rows
from bigtune.dist import World
from bigtune.errors import CheckpointError
from bigtune.model.vocabulary import companion_files, vocabulary_of
from bigtune.runfile import to_yaml
from bigtune.train.console import WorkerConsole
from bigtune.train.engine import Engine
from bigtune.train.guard import check_alike
from bigtune.train.heldout import held_out_loss
from bigtune.train.metrics import MetricsLog
from bigtune.train.staging import Staging
from bigtune.train.state import collect

SAVE_FILE = "save"
"""In a run's folder; whoever makes it asks for a checkpoint."""
FIRST_GUESS = 100e6
"""Bytes a second that a rank is thought to write before a save has shown it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: the trainer's own state, and the position in the data."""

    step: int = 0
    skipped_steps: int = 0
    position: Position = Position(0, 0)  # noqa: RUF009  # frozen


class Saver:
    """Saves a run's checkpoints; every rank has one and calls it at the same steps.

    One save is under way at a time. What goes wrong in it is kept until `finish`, which `failed` asks for.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        disks: Disks,
        engine: Engine,
        metrics: MetricsLog,
        rows: Rows,
        console: WorkerConsole,
        steps: int,
        saved_step: int,
    ) -> None:
        self._run, self._world, self._engine, self._metrics = run, world, engine, metrics
        self._rows, self._console, self._steps, self._saved_step = rows, console, steps, saved_step
        group = dist.own_group()
        self._where = Where(run.output / "checkpoints", world, disks, run.checkpoint.replicas, group)
        self._staging, self._said = Staging(), False
        self._held_out: list[Row] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved_at, self._seconds = time.monotonic(), 0.0
        # Read once: the model's folder may be gone when the last step is saved.
        self._model_files = self._read_model_files() if disks.writer[world.rank] == world.rank else {}
        self._base = base.Base.of(run.model.path, engine.adapted) if engine.adapted else None

    @property
    def failed(self) -> bool:
        """Whether a save under way has come to nothing on this rank; the others learn of it in their own time."""
        return self._error is not None

    @property
    def expected_seconds(self) -> float:
        """What a save takes: as long as the last one, or a guess before the first."""
        if not self._seconds:
            _, tensors = collect(self._engine)
            self._seconds = sum(tensor.nbytes for tensor in tensors.values()) / FIRST_GUESS
        return self._seconds

    def wanted(self, signalled: bool) -> bool:
        """Whether this rank wants the step that begins to be saved: by signal, by the file `save` in the run's folder,
        or since `checkpoint.every_minutes` have passed since the last save began."""
        minutes, file = self._run.checkpoint.every_minutes, self._run.output / SAVE_FILE
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        if self._world.is_main and file.exists():
            file.unlink(missing_ok=True)
            return True
        return signalled or late

    def save_if_due(self, progress: Progress, asked: bool) -> None:
        """Save after every `checkpoint.every_steps`-th step, and where it was asked for."""
        every = self._run.checkpoint.every_steps
        if asked or (every and progress.step % every == 0):
            self.save(progress, beside=self._run.checkpoint.asynchronous)

    def save(self, progress: Progress, beside: bool = False) -> None:
        """Save this step, unless it is saved or the run saves none.

        Args:
            beside: let a thread write, of a copy, if there is memory for one.

        Raises:
            CheckpointError: on every rank, if any could not write, or the ranks have drifted apart; with `beside`, of
                the save before.
        """
        self.finish()
        if progress.step == self._saved_step:
            return
        if not self._run.checkpoint.enabled:
            self._metrics.flush()
            return
        texts = self._texts(progress, self._look_at_held_out())
        self._metrics.flush()
        place = str(step_folder(self._where.checkpoints, progress.step))
        check_alike({**self._engine.replicas(), **texts}, self._world, place)
        layout, tensors = collect(self._engine)
        self._saved_at = time.monotonic()
        if beside and self._fits(tensors):
            copy = self._staging.copy(tensors)
            work = self._work(progress.step, layout, copy.tensors, texts, copy.image)
            self._thread = threading.Thread(target=self._kept(work), name="bigtune-save")
            self._thread.start()
        else:
            self._work(progress.step, layout, tensors, texts)()
        self._saved_step = progress.step

    def _look_at_held_out(self) -> dict[str, float]:
        """The held-out loss, where the best checkpoint is to be kept."""
        if not self._run.checkpoint.keep_best:
            return {}
        if not self._held_out:
            folder = vocabulary_of(self._run.model, self._run.output).folder
            self._held_out = packed_held_out(self._run, folder)
        found = {"held_out_loss": held_out_loss(self._engine, self._held_out, self._run.train.micro_batch)}
        self._metrics.note(**found)
        return found

    def finish(self) -> None:
        """Wait for the save under way, collectively.

        Raises:
            CheckpointError: on every rank, if it came to nothing.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _work(
        self,
        step: int,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        texts: Mapping[str, str],
        image: memoryview | None = None,
    ) -> Callable[[], None]:
        def work() -> None:
            folder = save(self._where, step, layout, tensors, texts, self._model_files, image)
            self._seconds = time.monotonic() - self._saved_at
            print(f"saved {folder} in {self._seconds:.2f} s", flush=True)
            self._prune(step)

        return work

    def _kept(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        return run

    def _fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether a copy of the state has room; said once where it does not."""
        fits = self._staging.fits(tensors, self._world)
        if not fits and not self._said:
            size = sum(tensor.nbytes for tensor in tensors.values()) / 2**30
            self._console.say(
                f"checkpoint: the training waits for each save: there is no memory for a copy of {size:.2f} GiB a rank"
            )
            self._said = True
        return fits

    def _prune(self, step: int) -> None:
        """Remove the checkpoints that nobody asked to keep."""
        if self._where.disks.writer[self._world.rank] != self._world.rank:
            return
        section, steps = self._run.checkpoint, steps_in(self._where.checkpoints)
        best = best_of(steps) if section.keep_best else None
        for old in to_prune(list(steps), step, section.keep_last, section.keep_every, best):
            remove(steps[old])

    def _texts(self, progress: Progress, held_out: Mapping[str, float]) -> dict[str, str]:
        import deepspeed
        import transformers

        trainer = {
            "step": progress.step,
            "steps": self._steps,
            "skipped_steps": progress.skipped_steps,
            **held_out,
            "precision": self._engine.dtype,
            "versions": {
                "bigtune": __version__,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "transformers": transformers.__version__,
            },
        }
        data = {
            **progress.position.to_json(),
            "seed": self._run.train.seed,
            "sequence_length": self._run.data.sequence_length,
            "fingerprint": self._rows.fingerprint,
            "documents": self._rows.documents,
        }
        texts = {"trainer.json": to_json(trainer), "data.json": to_json(data), "run.yaml": to_yaml(self._run)}
        return texts | ({base.FILE: to_json(self._base.to_json())} if self._base else {})

    def _read_model_files(self) -> Mapping[str, bytes]:
        """What makes a model of the weights; with the chat template that was learnt, where that is another one, and the
        buffers that the model's files hold."""
        folder = vocabulary_of(self._run.model, self._run.output).folder
        files = {name: path.read_bytes() for name, path in companion_files(folder).items()}
        if self._engine.saved_buffers:
            files[BUFFERS] = serialize(self._engine.saved_buffers)
        if self._rows.chat_template is not None:
            files["chat_template.jinja"] = self._rows.chat_template.encode()
        return files


def best_of(steps: Mapping[int, Path]) -> int | None:
    """The step with the least held-out loss, the first of several; None where none was measured."""
    losses: dict[int, float] = {}
    for step, folder in steps.items():
        with suppress(CheckpointError):  # a damaged one is not the best
            loss = read_json(folder, "trainer.json").get("held_out_loss")
            losses |= {step: loss} if isinstance(loss, float) else {}
    return min(losses, key=losses.__getitem__, default=None)
