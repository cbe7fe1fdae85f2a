"""What DeepSpeed's ZeRO-2 does in another way than ZeRO-3: every rank has the whole model in its precision.

group ─flatten─▶ | a a a a a b | b b c c · · |    float32 masters, gradients and states: an even cut of each
                                                  optimizer group; a border may pass through a parameter
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.checkpoint.layout import Parameter
from bigtune.dist import World, device
from bigtune.model.initial import Initial
from bigtune.model.load import replace_parameters
from bigtune.train.phases import Phases

SMALL = 100_000
"""Elements of a parameter that is looked at for drift."""


class Zero2:
    """DeepSpeed's ZeRO-2 optimizer, as the engine sees it."""

    gathers = False
    """Whether ranks wait for each other in the forward pass."""
    averages = True
    """Whether DeepSpeed divides gradients by the number of ranks."""
    own_shared_bytes = 0

    def __init__(self) -> None:
        self._zero: Any = None

    def settings(self, ds_config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed configuration to begin with."""
        return ds_config

    def load(
        self, model: PreTrainedModel, initial: Initial, _ds_config: dict[str, Any], dtype: torch.dtype, _world: World
    ) -> dict[str, nn.Parameter]:
        """Replace every meta parameter by one that is read whole, on every rank.

        Returns:
            The parameters by Hugging Face's names.
        """

        def whole(name: str, old: nn.Parameter) -> nn.Parameter:
            new = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device()), old.requires_grad)
            new.__dict__.update(old.__dict__)
            initial.read(name, 0, new.numel(), new.data.view(-1))
            return new

        return replace_parameters(model, whole)

    def take_over(self, zero: Any, _parameters: Collection[nn.Parameter], phases: Phases) -> None:
        """Once DeepSpeed's optimizer is there."""
        self._zero = zero
        refuse_non_finite(zero)
        zero.reduce_ipg_grads = phases.timed("reduce", zero.reduce_ipg_grads)

    def groups(self, names: Mapping[int, str]) -> Iterator[tuple[tuple[Parameter, ...], torch.Tensor, dict[str, Any]]]:
        """Parameters, this rank's float32 partition and the optimizer group, group by group.

        Args:
            names: of the parameters, by identity.
        """
        for members, offsets, master, group in zip(
            self._zero.round_robin_bit16_groups,  # in the order in which they are flattened
            self._zero.round_robin_bit16_offsets,
            self._zero.single_partition_of_fp32_groups,
            self._zero.param_groups,
            strict=True,
        ):
            parameters = tuple(
                Parameter(names[id(member)], tuple(member.shape), 0, master.numel(), offset)
                for member, offset in zip(members, offsets, strict=True)
            )
            yield parameters, master, group

    def refresh(self) -> None:
        """Make the model compute with the master values, after they were overwritten, collectively."""
        self._zero.update_lp_params()

    def held(self, parameters: Collection[nn.Parameter]) -> dict[str, list[torch.Tensor]]:
        """The lasting tensors of this rank by kind, but for the optimizer's states; some share memory."""
        zero = self._zero
        averaged = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
        buckets = [buffer for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer if buffer is not None]
        return {
            "parameters": [parameter.data for parameter in parameters],
            "gradients": [*averaged, *(parameter.grad for parameter in parameters if parameter.grad is not None)],
            "buckets": buckets,
            "optimizer": [*zero.single_partition_of_fp32_groups],
        }

    def replicas(self, parameters: Collection[nn.Parameter]) -> list[torch.Tensor]:
        """Of what each rank holds whole, and the same as every other, the small ones: enough to see a drift by."""
        return [parameter.data for parameter in parameters if parameter.numel() <= SMALL]


def refuse_non_finite(zero: Any) -> None:
    """Skip every step whose gradient is not finite on some rank, in every data type.

    The global norm says it, which the ranks have reduced: DeepSpeed gives -1 for one that is not finite. What DeepSpeed
    itself does then depends on the data type and its settings, so that it does not get to decide.
    """

    def check(partition_gradients: bool = True) -> None:
        zero.overflow = not 0.0 <= float(zero.scaled_global_norm()) < math.inf

    zero.check_grad_overflow, zero.check_overflow = True, check
