"""When a run is saved, and what goes into its checkpoints beside the shards."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import save as serialize

from bigtune import __version__
from bigtune.checkpoint import base
from bigtune.checkpoint.layout import BUFFERS, step_folder
from bigtune.checkpoint.save import prune, save, to_json
from bigtune.config import Run
from bigtune.data.rows import Position, Rows
from bigtune.dist import World
from bigtune.model.vocabulary import companion_files, vocabulary_of
from bigtune.runfile import to_yaml
from bigtune.train.engine import Engine
from bigtune.train.guard import check_alike
from bigtune.train.metrics import MetricsLog
from bigtune.train.state import collect


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: the trainer's own state, and the position in the data."""

    step: int = 0
    skipped_steps: int = 0
    position: Position = Position(0, 0)  # noqa: RUF009  # frozen


@dataclass(slots=True)
class Saver:
    """Saves a run's checkpoints; every rank has one and calls it at the same steps."""

    run: Run
    world: World
    engine: Engine
    metrics: MetricsLog
    rows: Rows
    steps: int
    saved_step: int
    _model_files: Mapping[str, bytes] = field(init=False)
    _base: base.Base | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Read once: the model's folder may be gone when the last step is saved.
        self._model_files = self._read_model_files() if self.world.is_main else {}
        if self.engine.adapted:
            self._base = base.Base.of(self.run.model.path, self.engine.adapted)

    def save_if_due(self, progress: Progress) -> None:
        """Save after every `checkpoint.every_steps`-th step."""
        every = self.run.checkpoint.every_steps
        if every and progress.step % every == 0:
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Save this step, unless it is saved.

        Raises:
            CheckpointError: on every rank, if any could not write, or the ranks have drifted apart.
        """
        if progress.step == self.saved_step:
            return
        self.metrics.flush()
        folder = self.run.output / "checkpoints"
        texts = self._texts(progress)
        check_alike({**self.engine.replicas(), **texts}, self.world, str(step_folder(folder, progress.step)))
        layout, tensors = collect(self.engine)
        save(folder, progress.step, layout, tensors, self.world.rank, texts, self._model_files)
        self.saved_step = progress.step
        if self.world.is_main and self.run.checkpoint.keep_last:
            prune(folder, progress.step, self.run.checkpoint.keep_last)

    def _texts(self, progress: Progress) -> dict[str, str]:
        import deepspeed
        import transformers

        trainer = {
            "step": progress.step,
            "steps": self.steps,
            "skipped_steps": progress.skipped_steps,
            "precision": self.engine.dtype,
            "versions": {
                "bigtune": __version__,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "transformers": transformers.__version__,
            },
        }
        data = {
            **progress.position.to_json(),
            "seed": self.run.train.seed,
            "sequence_length": self.run.data.sequence_length,
            "fingerprint": self.rows.fingerprint,
            "documents": self.rows.documents,
        }
        texts = {"trainer.json": to_json(trainer), "data.json": to_json(data), "run.yaml": to_yaml(self.run)}
        return texts | ({base.FILE: to_json(self._base.to_json())} if self._base else {})

    def _read_model_files(self) -> Mapping[str, bytes]:
        """What makes a model of the weights; with the chat template that was learnt, where that is another one, and the
        buffers that the model's files hold."""
        folder = vocabulary_of(self.run.model, self.run.output).folder
        files = {name: path.read_bytes() for name, path in companion_files(folder).items()}
        if self.engine.saved_buffers:
            files[BUFFERS] = serialize(self.engine.saved_buffers)
        if self.rows.chat_template is not None:
            files["chat_template.jinja"] = self.rows.chat_template.encode()
        return files
