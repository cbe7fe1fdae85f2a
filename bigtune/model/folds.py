"""What LoRA put into a model, as a checkpoint tells of it: plain data, which merging reads without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fold:
    """How one weight becomes that of the merged layer: plus scale · B A, transposed where it is kept [in, out]."""

    lora_a: str
    lora_b: str
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Adapted:
    """What training put into a model.

    `folds` are by the name of the base layer's weight; `frozen` are the shapes of what is not trained, by name;
    `config` is peft's adapter_config.json, but for the base model's path.
    """

    folds: Mapping[str, Fold]
    frozen: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]


def is_adapter(name: str) -> bool:
    """Whether a plain name is that of an adapter's matrix."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))
