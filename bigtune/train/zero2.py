"""What DeepSpeed's ZeRO-2 does in another way than ZeRO-3: every rank has the whole model in its precision.

group ─flatten─▶ | a a a a a b | b b c c · · |    float32 masters, gradients and states: an even cut of each
                                                  optimizer group; a border may pass through a parameter
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.checkpoint.layout import Parameter
from bigtune.dist import device
from bigtune.model.load import replace_parameters
from bigtune.model.shards import Shards


def load(model: PreTrainedModel, shards: Shards, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Replace every meta parameter by one that is read whole, on every rank.

    Returns:
        The parameters by Hugging Face's names.
    """
    parameters: dict[str, nn.Parameter] = {}
    replaced: dict[int, nn.Parameter] = {}
    for name, old in model.named_parameters():
        new = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device()), old.requires_grad)
        new.__dict__.update(old.__dict__)
        shards.read(name, 0, new.numel(), new.data.view(-1))
        parameters[name] = replaced[id(old)] = new
    replace_parameters(model, replaced)
    return parameters


def groups(zero: Any, names: dict[int, str]) -> Iterator[tuple[tuple[Parameter, ...], torch.Tensor, dict[str, Any]]]:
    """Parameters, this rank's float32 partition and the optimizer group, group by group.

    Args:
        zero: DeepSpeed's optimizer.
        names: of the parameters, by identity.
    """
    for members, offsets, master, group in zip(
        zero.round_robin_bit16_groups,  # in the order in which they are flattened
        zero.round_robin_bit16_offsets,
        zero.single_partition_of_fp32_groups,
        zero.param_groups,
        strict=True,
    ):
        parameters = tuple(
            Parameter(names[id(member)], tuple(member.shape), 0, master.numel(), offset)
            for member, offset in zip(members, offsets, strict=True)
        )
        yield parameters, master, group


def refresh(zero: Any) -> None:
    """Make the model compute with the master values, after they were overwritten, collectively."""
    zero.update_lp_params()
