"""What the checkpoint of a LoRA run leaves in the base model, and which base model that is.

    step-40/adapter.json    path and fingerprint of the base; how adapters fold into it; what is frozen; peft's config

A checkpoint holds what was trained alone. Resuming and merging read the rest from the base model's own files.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtune.checkpoint.folder import read_json
from bigtune.errors import CheckpointError, ModelError
from bigtune.model.folds import Adapted, Fold

if TYPE_CHECKING:
    from bigtune.model.shards import Shards

FILE = "adapter.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The base model of a LoRA run, and what was put into it."""

    path: Path
    fingerprint: str
    adapted: Adapted

    @classmethod
    def of(cls, path: Path, adapted: Adapted) -> "Base":
        """The model folder as it is now."""
        from bigtune.model.shards import Shards  # imports torch

        return cls(path.absolute(), Shards(path).fingerprint(), adapted)

    def to_json(self) -> dict[str, Any]:
        facts = {"path": str(self.path), "fingerprint": self.fingerprint}
        return {**facts, **asdict(self.adapted)}

    @classmethod
    def read(cls, checkpoint: Path) -> "Base | None":
        """That of a checkpoint; None where it holds the whole model.

        Raises:
            CheckpointError: adapter.json is broken.
        """
        if not (checkpoint / FILE).is_file():
            return None
        tree = read_json(checkpoint, FILE)
        try:
            folds = {name: Fold(**fold) for name, fold in tree["folds"].items()}
            frozen = {name: tuple(shape) for name, shape in tree["frozen"].items()}
            adapted = Adapted(folds, frozen, tree["config"])
            return cls(Path(tree["path"]), tree["fingerprint"], adapted)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{checkpoint / FILE}: broken ({error!r}); take another step") from None

    def shards(self, checkpoint: Path, now: Path | None = None) -> "Shards":
        """The base model's tensors.

        Args:
            now: its folder, if not the one that it had in training.

        Raises:
            CheckpointError: it is gone, or another one.
        """
        from bigtune.model.shards import Shards  # imports torch

        folder = now or self.path
        try:
            shards = Shards(folder)
            same = shards.fingerprint() == self.fingerprint
        except (ModelError, OSError) as error:
            raise CheckpointError(
                f"{checkpoint}: holds adapters alone, and their base model cannot be read: {error}; bring it back, or "
                "merge with --base and the folder where it is now"
            ) from None
        if not same:
            raise CheckpointError(
                f"{checkpoint}: its adapters were trained on another base model than {folder} holds now; "
                "bring that one back, or merge with --base and the folder where it is now"
            )
        return shards
