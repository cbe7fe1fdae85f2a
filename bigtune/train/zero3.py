"""ZeRO-3: every rank has a part of each parameter, of its gradient and of its optimizer's state.

Shapes follow from the world: of n elements over W ranks each has ceil(n / W), the last ones padding.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from bigtune.checkpoint.layout import Parameter
from bigtune.dist import World, device
from bigtune.model.initial import Initial
from bigtune.model.load import replace_parameters
from bigtune.train.phases import Phases
from bigtune.train.reduce import REDUCE, Reducer, staging
from bigtune.train.whole import Wholes

EVERY_PARAMETER = 2**62


class Zero3:
    """DeepSpeed's ZeRO-3 optimizer, as the engine sees it.

    Where ranks see each other's memory, and where there is but one, gradients and parameters go the short way of
    `reduce.py` and `whole.py`; elsewhere DeepSpeed's own.
    """

    def __init__(self, world: World, offload: bool) -> None:
        """Args: offload: whether the optimizer's states lie in host memory, where DeepSpeed puts gradients too."""
        self._world, self._near = world, not offload
        self._wholes: Wholes | None = None
        self._staging: torch.Tensor | None = None
        self._zero: Any = None

    @property
    def gathers(self) -> bool:
        """Whether ranks wait for each other in the forward pass."""
        return self._wholes is None

    @property
    def averages(self) -> bool:
        """Whether DeepSpeed divides gradients by the number of ranks."""
        return self._wholes is None

    @property
    def own_shared_bytes(self) -> int:
        """This rank's part of the parameters, where they are in memory that all ranks share."""
        return self._wholes.own_bytes if self._wholes else 0

    def settings(self, ds_config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed configuration to begin with, once the model is loaded."""
        if self._wholes is None:
            return ds_config
        near = {
            "stage3_param_persistence_threshold": EVERY_PARAMETER,  # nothing is saved by looking away from them
            "contiguous_gradients": False,  # no bucket to copy them to
        }
        return {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], **near}}

    def load(
        self, model: PreTrainedModel, initial: Initial, ds_config: dict[str, Any], dtype: torch.dtype, world: World
    ) -> dict[str, nn.Parameter]:
        """Replace every meta parameter by a ZeRO-3 one whose partition is read from its byte range, or is new.

        The same as `zero.Init` and `from_pretrained` would leave behind, to the last bit, but no rank reads or
        holds more than its share. Collective.

        Returns:
            The ZeRO-3 parameters by Hugging Face's names.
        """
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

        if self._near:
            self._wholes = Wholes.of([parameter.numel() for parameter in model.parameters()], dtype, world)
        if self._wholes and world.world_size > 1:
            self._staging = staging(world)
            self._wholes = None if self._staging is None else self._wholes
        init = deepspeed.zero.Init(config_dict_or_path=ds_config, dtype=dtype)

        def part(name: str, old: nn.Parameter) -> nn.Parameter:
            # A stand-in with the full shape and zero strides: it takes no memory.
            new = nn.Parameter(torch.empty(1, dtype=dtype, device=device()).expand(old.shape), old.requires_grad)
            new.__dict__.update(old.__dict__)
            init._convert_to_deepspeed_param(new)
            length = -(-old.numel() // world.world_size)
            # Not zeros: memory that is touched here for the first time costs more than what is read into it.
            if self._wholes:
                partition, whole = self._wholes.place(old.numel(), dtype)
            else:
                partition = torch.empty(length, dtype=dtype, device=device())
            start = length * world.rank
            count = min(length, max(0, old.numel() - start))
            if count:
                initial.read(name, start, count, partition)
            partition[count:].zero_()  # padding
            partition.ds_numel = length  # type: ignore[attr-defined]
            partition.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
            partition.final_location = None  # type: ignore[attr-defined]
            new.ds_tensor = partition  # type: ignore[attr-defined]
            new.ds_numel_aligned = length * world.world_size  # type: ignore[attr-defined]
            new.data = torch.empty(0, dtype=dtype, device=device())
            new.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
            if self._wholes:
                self._wholes.take_over(new, whole)
            return new

        return replace_parameters(model, part)

    def take_over(self, zero: Any, parameters: Collection[nn.Parameter], phases: Phases) -> None:
        """Once DeepSpeed's optimizer is there; collective."""
        self._zero = zero
        if self._wholes is not None:
            Reducer(zero, self._world, self._staging, phases)
            self._wholes.settle(zero, parameters)
        else:
            setattr(zero, REDUCE, phases.timed("reduce", getattr(zero, REDUCE)))
        refuse_non_finite(zero)

    def groups(self, names: Mapping[int, str]) -> Iterator[tuple[tuple[Parameter, ...], torch.Tensor, dict[str, Any]]]:
        """Parameters, this rank's float32 partition and the optimizer group of each sub-group."""
        return groups(self._zero, names)

    def refresh(self) -> None:
        """Make the model compute with the master values, after they were overwritten, collectively."""
        zero = self._zero
        zero._partition_all_parameters()  # gathered persistent parameters would be stale
        distributed.barrier()  # a rank may still compute with them
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def held(self, parameters: Collection[nn.Parameter]) -> dict[str, list[torch.Tensor]]:
        """The lasting tensors of this rank by kind, but for the optimizer's states; some share memory.

        What all ranks share is not among them: see `own_shared_bytes`.
        """
        zero = self._zero
        masters = zero.fp32_partitioned_groups_flat
        apart = [cast(Any, parameter) for parameter in parameters if not hasattr(parameter, "whole")]
        return {
            "parameters": [tensor for parameter in apart for tensor in (parameter.ds_tensor, parameter.data)],
            "gradients": [zero.grad_partitions_flat_buffer, *(m.grad for m in masters if m.grad is not None)],
            "buckets": [bucket.buffer for bucket in zero.ipg_buckets.values() if bucket.buffer is not None],
            "optimizer": [*masters],
        }

    def replicas(self, _: Collection[nn.Parameter]) -> list[torch.Tensor]:
        """What each rank holds whole, and the same as every other: small parameters that stay gathered."""
        if self._wholes is not None:
            return []
        return [p.data for p in self._zero.persistent_parameters if p.data.numel() == p.ds_numel]


def groups(zero: Any, names: Mapping[int, str]) -> Iterator[tuple[tuple[Parameter, ...], torch.Tensor, dict[str, Any]]]:
    """Parameters, this rank's float32 partition and the optimizer group of each sub-group.

    Args:
        zero: DeepSpeed's optimizer.
        names: of the parameters, by identity.
    """
    for index, members in enumerate(zero.fp16_groups):
        parameters, offset = [], 0
        for member in members:
            length = member.partition_numel()
            parameters.append(Parameter(names[id(member)], tuple(member.ds_shape), offset, length))
            offset += length
        group = zero.param_groups[zero.sub_group_to_group_id[index]]
        yield tuple(parameters), zero.fp32_partitioned_groups_flat[index], group


class _NotFiniteError(Exception):
    """Found before the optimizer has changed anything."""


def refuse_non_finite(zero: Any) -> None:
    """Skip every step whose gradient is not finite on some rank, in every data type.

    The global norm says it, which the ranks have reduced: DeepSpeed gives -1 for one that is not finite. What
    DeepSpeed itself does then depends on its release, so that it does not get to decide.
    """
    norms, step = zero._get_norm_groups, zero.step

    def finite_norms() -> Any:
        found = norms()
        if not all(0.0 <= float(norm) < math.inf for norm in found):
            raise _NotFiniteError
        return found

    def guarded_step(closure: None = None) -> None:
        try:
            step()
        except _NotFiniteError:
            zero.overflow, zero._global_grad_norm = True, math.inf
            zero._overflow_clean_up(zero.loss_scale)  # drops the gradients

    zero._get_norm_groups, zero.step = finite_norms, guarded_step
