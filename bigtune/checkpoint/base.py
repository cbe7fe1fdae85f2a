"""What the checkpoint of a LoRA run leaves in the base model, and which base model that is.

    step-40/adapter.json    path and fingerprint of the base; how adapters fold into it; what is frozen; peft's config

A checkpoint holds what was trained alone. Resuming and merging read the rest from the base model's own files.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigtune.checkpoint.layout import read_json
from bigtune.errors import CheckpointError, ModelError
from bigtune.model.adapter import Adapted, Fold, is_adapter
from bigtune.model.shards import Shards
from bigtune.model.weights import Weights

FILE = "adapter.json"


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of a merged model, and what reads it whole, in a dtype."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Base:
    """The base model of a LoRA run, and what was put into it."""

    path: Path
    fingerprint: str
    adapted: Adapted

    @classmethod
    def of(cls, path: Path, adapted: Adapted) -> "Base":
        """The model folder as it is now."""
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

    def shards(self, checkpoint: Path, now: Path | None = None) -> Shards:
        """The base model's tensors.

        Args:
            now: its folder, if not the one that it had in training.

        Raises:
            CheckpointError: it is gone, or another one.
        """
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


def fold(trained: Mapping[str, Named], base: Base, weights: Weights) -> dict[str, Named]:
    """The tensors of the merged model: those trained whole, and the base's with adapters folded in."""
    whole = {name: tensor for name, tensor in trained.items() if not is_adapter(name)}
    for name, shape in base.adapted.frozen.items():
        how = base.adapted.folds.get(name)
        pair = (trained[how.lora_a], trained[how.lora_b]) if how else None
        whole[name] = Named(name, shape, partial(_folded, weights, name, shape, how, pair))
    return whole


def _folded(
    weights: Weights,
    name: str,
    shape: tuple[int, ...],
    how: Fold | None,
    pair: tuple[Named, Named] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W + scale · B A, computed in float32, then cast; or the base's tensor as it is."""
    weight = torch.empty(shape, dtype=torch.float32 if how else dtype)
    weights.read(name, 0, weight.numel(), weight.view(-1))
    if how and pair:
        lora_a, lora_b = (matrix.read(torch.float32) for matrix in pair)
        change = lora_b @ lora_a
        weight += (change.T if how.transposed else change) * how.scale
    return weight.to(dtype)
