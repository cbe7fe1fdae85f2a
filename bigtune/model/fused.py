"""Norms, rotary positions and gated activations of a layer, each as one kernel, on CUDA.

The kernels are Liger's (https://arxiv.org/abs/2410.10989), where liger-kernel is installed and knows the family. They
are used only where a layer with them gives what transformers' own gives, in a small trial on this device: outputs and
all gradients, forward and backward.
"""

import copy
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bigtune.dist import device
from bigtune.model import attention
from bigtune.model.load import EXACT

OFFSETS = (0, 17, 48)
"""Two documents for the trial."""
APART = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far an output or a gradient may be apart, relative to its norm: bfloat16 rounds in other places."""


def fuse_layers(model: PreTrainedModel) -> bool:
    """Put fused kernels into a model whose parameters may be on the meta device; tells whether it did."""
    if device().type != "cuda" or model.config.model_type not in EXACT:
        return False
    try:
        from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found]
            _apply_liger_kernel_to_instance,
        )
    except ImportError:
        return False

    def apply(to: PreTrainedModel) -> None:
        _apply_liger_kernel_to_instance(model=to, cross_entropy=False, fused_linear_cross_entropy=False)

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    if not is_same(apply, model.config, model.dtype):
        vars(module).update(before)
        return False
    apply(model)
    return True


def is_same(apply: Callable[[PreTrainedModel], None], config: Any, dtype: torch.dtype) -> bool:
    """Whether a model of two layers of the family and width gives the same after `apply`, forward and backward."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 2, 64, None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    try:
        with torch.device(device()):
            trial = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation=attention.NAME).train()
        wanted = _outcome(trial)
        apply(trial)
        found = _outcome(trial)
    except Exception:  # another release, a compiler that fails, a config that cannot be cut: each in its own way
        return False
    return all(distance(one, other) <= APART[dtype] for one, other in zip(found, wanted, strict=True))


def _outcome(model: PreTrainedModel) -> list[torch.Tensor]:
    """Hidden states of two packed documents, and the gradients of a random sum of them."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (1, OFFSETS[-1]), generator=random)
    places = torch.cat([torch.arange(end - start) for start, end in pairwise(OFFSETS)])[None]
    inputs = {"input_ids": ids.to(device()), "position_ids": places.to(device()), "use_cache": False}
    with attention.documents(OFFSETS):
        hidden = model.base_model(**inputs)[0]
        factors = torch.randn(hidden.shape, generator=random).to(hidden)
        trained = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
        return [hidden.detach(), *torch.autograd.grad((hidden * factors).sum(), trained)]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of what is to be the same, relative to its norm; no number where either holds none."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-30))
