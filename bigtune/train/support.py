"""What goes together: preset × optimizer. The code refuses by this one table, and tests try every cell.

`tools/document_optimizers.py` makes docs/optimizers.md of it.
"""

from collections.abc import Mapping
from typing import Any

from bigtune.config import Run
from bigtune.errors import ConfigError

YES = ""
"""Supported; any other cell says why not, and what to take."""

ADAFACTOR = (
    "its factored moments and its clipping need whole matrices, where a rank has a flat piece, so that the result "
    "would depend on the number of ranks; take adamw_8bit, or lion_8bit for the least memory"
)
# Tried with DeepSpeed 0.19.8 on a Llama of 2 layers, ZeRO-3, float32: without clipping, 1 and 2 ranks agree; with
# max_grad_norm 1 the matrices move 1/19 as far, since the norm that is reported and clipped is the update's, 19.4.
MUON = (
    "DeepSpeed's clips its orthogonalized update in place of the gradient, so that max_grad_norm divides the learning "
    "rate by a number that grows with the model; take adamw"
)

PRESETS = ("zero3", "zero3_offload", "zero2")
TRAIN: Mapping[str, tuple[str, ...]] = {
    "adamw": (YES, YES, YES),
    "adamw_8bit": (YES, YES, YES),
    "lion_8bit": (YES, YES, YES),
    "sgd": (YES, YES, YES),
    "adam": (YES, YES, YES),
    "adafactor": (ADAFACTOR, ADAFACTOR, ADAFACTOR),
    "muon": (MUON, MUON, MUON),
}


def preset_of(ds_config: Mapping[str, Any]) -> str:
    """Which of `PRESETS` a DeepSpeed configuration is like, whatever it is called."""
    zero = ds_config["zero_optimization"]
    if zero["stage"] == 2:
        return "zero2"
    return "zero3" if zero.get("offload_optimizer", {}).get("device", "none") == "none" else "zero3_offload"


def check(run: Run, ds_config: Mapping[str, Any]) -> None:
    """Refuse what the table refuses.

    Raises:
        ConfigError: the optimizer does not go with the preset.
    """
    preset = preset_of(ds_config)
    refusal = TRAIN[run.optim.name][PRESETS.index(preset)]
    if refusal:
        raise ConfigError(f"optim.name: {run.optim.name} is refused with {preset}: {refusal}")
