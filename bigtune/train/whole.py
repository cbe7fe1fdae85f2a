"""Parameters that every rank sees whole, though each lies in memory once: the ranks of one host share it.

A rank's partition is its stretch of the shared parameter. What ZeRO-3 gathers layer by layer, forward and backward, is
there already, and nothing is sent or copied:

    shared    | a a a a a a · · | b b b b |          a rank writes its own stretches after the optimizer's step,
    rank 0      ▀▀▀▀▀▀▀           ▀▀▀                 while all wait; then all read
    rank 1              ▀▀▀▀▀▀▀       ▀▀▀

A rank that is alone has everything as it is, on a GPU too.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from bigtune.dist import World, device
from bigtune.train.shared import share

ALIGNMENT = 64
"""Bytes at which a parameter begins: a cache line, and a vector register."""


class Wholes:
    """Gathers ZeRO-3 parameters by looking at them."""

    def __init__(self, world: World, memory: torch.Tensor | None) -> None:
        """Args: memory: of all ranks of the host, for `place`; None for a rank that is alone."""
        self._world, self._memory, self._used = world, memory, 0

    @classmethod
    def of(cls, sizes: Iterable[int], dtype: torch.dtype, world: World) -> "Wholes | None":
        """For parameters of so many elements; collective. None where ranks cannot see each other's memory."""
        if world.world_size == 1:
            return cls(world, None)
        if device().type != "cpu":
            return None
        memory = share(sum(_padded(size, dtype, world) for size in sizes), world)
        return None if memory is None else cls(world, memory)

    @property
    def own_bytes(self) -> int:
        """This rank's part of the shared memory."""
        return 0 if self._memory is None else self._used // self._world.world_size

    def place(self, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where this rank's partition of the next parameter lies, and all of the parameter, flat, if it is shared."""
        length = -(-size // self._world.world_size)
        if self._memory is None:
            return torch.empty(length, dtype=dtype, device=device()), None
        end = self._used + length * self._world.world_size * dtype.itemsize
        padded = self._memory[self._used : end].view(dtype)
        self._used += _padded(size, dtype, self._world)
        return padded[length * self._world.rank :][:length], padded[:size]

    def take_over(self, parameter: Any, whole: torch.Tensor | None) -> None:
        """Make a ZeRO-3 parameter gather this way from now on, from where `place` said that it lies."""
        if whole is not None:
            parameter.home, parameter.whole = parameter.ds_tensor.data, whole.view(parameter.ds_shape)
        parameter.all_gather = partial(self._gather, parameter)
        parameter.all_gather_coalesced = _Gathered

    def settle(self, zero: Any, parameters: Iterable[nn.Parameter]) -> None:
        """Once DeepSpeed's optimizer is set up, collectively: it has moved the partitions to memory of its own."""
        members = list(parameters)
        zero.parameter_offload._remove_module_hooks()  # which gather before each module, and release after it
        if self._memory is not None:
            for parameter in members:
                parameter.ds_tensor.data = parameter.home  # type: ignore[attr-defined]
            zero.lp_param_buffer = None
            zero.fp16_partitioned_groups_flat = [torch.empty(0)] * len(zero.fp16_groups)
            zero._reassign_or_swap_out_partitioned_parameters = partial(_publish, zero)
        self._gather(members[0], members)

    def _gather(self, parameter: Any, parameters: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if self._memory is not None and parameters is not None:
            distributed.barrier()  # until all have written theirs
        for one in parameters or [parameter]:
            _look(one)


class _Gathered:
    """Of parameters in flight, as DeepSpeed's coordinator fetches them; they are there at once."""

    def __init__(self, parameters: Iterable[Any], *_: Any, **__: Any) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._parameters = list(parameters)
        for parameter in self._parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **_: Any) -> None:
        for parameter in self._parameters:
            _look(parameter)


def _look(parameter: Any) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    whole = getattr(parameter, "whole", None)
    parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape) if whole is None else whole
    parameter.ds_status = ZeroParamStatus.AVAILABLE


def _publish(zero: Any, index: int) -> None:
    """Write a sub-group's master values where all ranks read them, each its own."""
    master, offset = zero.fp32_partitioned_groups_flat[index].data, 0
    for parameter in zero.fp16_groups[index]:
        length = parameter.partition_numel()
        parameter.ds_tensor.data.copy_(master[offset : offset + length])
        offset += length


def _padded(size: int, dtype: torch.dtype, world: World) -> int:
    """Bytes of a parameter and what is left free behind it."""
    whole = -(-size // world.world_size) * world.world_size * dtype.itemsize
    return -(-whole // ALIGNMENT) * ALIGNMENT
