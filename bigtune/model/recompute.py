"""Activation checkpointing: layers that keep their input alone and compute the rest again in the backward pass.

Chen et al., https://arxiv.org/abs/1604.06174. transformers marks the layers that it can be done for; the kind is the
one without reentrant autograd, which needs no input that requires a gradient: a frozen embedding, as under LoRA, is
no trap.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from bigtune.errors import ModelError


def checkpoint_activations(model: nn.Module, every: str | int) -> int:
    """Have every `every`-th layer computed again, from the first on; "full" is 1, "none" is none of them.

    Returns:
        How many layers are.

    Raises:
        ModelError: the model has no layer that it can be done for.
    """
    if every == "none":
        return 0
    layers = _layers(model)
    if not layers:
        raise ModelError(
            "train.activation_checkpointing: transformers knows no layer of this model that can be computed again; "
            "set it to none"
        )
    chosen = layers[:: 1 if every == "full" else int(every)]
    for layer in chosen:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _recomputed
    return len(chosen)


def _layers(module: nn.Module) -> list[Any]:
    """The outermost ones: a part of a layer that is computed again needs no checkpoint of its own."""
    found: list[Any] = []
    for child in module.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else _layers(child)
    return found


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    # It stops at the last tensor that is needed. Run to its end, it would have ZeRO-3 release the parameters of the
    # layer's last module, whose backward pass comes next (tried with DeepSpeed 0.19.8: sizes of 0).
    with set_checkpoint_early_stop(True):
        return checkpoint(forward, *inputs, use_reentrant=False)
