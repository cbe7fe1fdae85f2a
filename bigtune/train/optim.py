"""The optimizer over three parameter groups.

    matrices     weight decay, 8-bit states where asked for
    embeddings   of tokens and positions, and the output head: no decay, 32-bit states
    vectors      norms and biases: no decay, 32-bit states

Decay and state precision belong to the group. They are never left to a tensor's size or identity, since
ZeRO-3 flattens a group into partitions whose size depends on the world.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.config import Optim

CODE_BOOKS = {"qmap1": "dynamic", "qmap2": "udynamic"}
GROUPS = ("matrices", "embeddings", "vectors")
BLOCK = 256
"""Elements that share one scale in 8-bit states (Dettmers et al., https://arxiv.org/abs/2110.02861)."""


def parameter_groups(model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, in the order of `GROUPS`; empty ones are left out.

    Call it before parameters are partitioned or after: shapes are taken from ZeRO-3 where it hides them.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]  # of positions, too
    embeddings = {id(module.weight) for module in (*modules, model.get_output_embeddings())}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            kind = "embeddings" if id(parameter) in embeddings else "matrices" if len(shape) > 1 else "vectors"
            members[kind].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": optim.weight_decay if name == "matrices" else 0.0,
            "optim_bits": 8 if name == "matrices" and optim.name.endswith("_8bit") else 32,
        }
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(
    groups: list[dict[str, Any]], optim: Optim, adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    """The optimizer named in the run file.

    Each updates an element by that element's own gradient and state, so that it works on flat partitions, wherever
    their borders are. Decay is decoupled (https://arxiv.org/abs/1711.05101) in adamw and lion
    (https://arxiv.org/abs/2302.06675); in sgd and adam it is a part of the gradient, as torch has it.

    Args:
        adamw: the implementation of 32-bit AdamW, if not torch's fused one.
    """
    settings: dict[str, Any] = {"lr": optim.learning_rate}
    if optim.name == "sgd":
        return torch.optim.SGD(groups, **settings, momentum=optim.momentum or 0.0, fused=True)
    settings["betas"] = optim.betas
    if optim.name == "lion_8bit":
        return _by_group("Lion8bit")(groups, **settings)
    settings["eps"] = optim.epsilon
    if optim.name == "adamw_8bit":
        return _by_group("AdamW8bit")(groups, **settings)
    if optim.name == "adam":
        return torch.optim.Adam(groups, **settings, fused=True)
    return adamw(groups, **settings, **({"fused": True} if adamw is torch.optim.AdamW else {}))


def _by_group(name: str) -> Callable[..., torch.optim.Optimizer]:
    """An 8-bit optimizer whose state precision is the group's; bitsandbytes decides it by tensor size and identity."""
    import bitsandbytes  # takes seconds to import, so only where it is used

    base: Any = getattr(bitsandbytes.optim, name)

    class ByGroup(base):  # type: ignore[misc]
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group["optim_bits"], "min_8bit_size": 0}

    return ByGroup


def export_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What a checkpoint keeps of one partition's state: tensors, and numbers such as the step.

    8-bit code books are constants and are left out.
    """
    tensors, scalars = {}, {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            scalars[name] = float(value)
        elif name not in CODE_BOOKS:
            tensors[name] = value
    return tensors, scalars


def import_state(
    optimizer: torch.optim.Optimizer,
    partition: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float],
) -> None:
    """Give a partition the state that `export_state` took, in the form that its optimizer keeps it in."""
    state: dict[str, Any] = {name: tensor.to(partition.device) for name, tensor in tensors.items()}
    if isinstance(optimizer, torch.optim.Adam):  # and AdamW: steps in a float32 tensor, where others have an integer
        state |= {name: torch.tensor(value, device=partition.device) for name, value in scalars.items()}
    else:
        state |= {name: int(value) for name, value in scalars.items()}
    for kind, book in code_books(optimizer).items() if "absmax1" in state else ():
        if kind in state:  # lion has one moment
            state[f"qmap{kind[-1]}"] = book.to(partition.device)
    optimizer.state[partition] = state


def code_books(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The values of 8-bit codes by kind of state, in the host's memory; none for an optimizer without such."""
    if not hasattr(optimizer, "fill_qmap"):
        return {}
    optimizer.fill_qmap()
    return {f"state{name[-1]}": optimizer.name2qmap[book].cpu() for name, book in CODE_BOOKS.items()}  # type: ignore[attr-defined]
