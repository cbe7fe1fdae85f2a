"""Gradients summed over the ranks of one host, straight into each rank's float32 partition.

A rank writes the others' parts of its gradients where these can read them; when all have, each sums what is its own:

    shared    | for 0 | for 1 |    rank 0 writes     for 1, reads   for 0 of rank 1
              | for 0 | for 1 |    rank 1 writes     for 0, reads   for 1 of rank 0

The memory is used by turns, one half being written while the other is read, so that one barrier a turn is enough. What
a rank sums is in the order of the ranks. The partitions are one flat tensor, and the optimizer steps on it as it is:
gradients are not copied, cast or divided on the way, as DeepSpeed's own path does. A rank that is alone just adds.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import distributed

from bigtune.dist import World
from bigtune.errors import TrainError
from bigtune.train.phases import Phases
from bigtune.train.shared import share

TURN = 2**22
"""Elements that a rank writes for the others before they are read: 16 MiB."""
BUCKET = 2**24
"""Elements of gradients that wait to be summed together."""
STRETCH = 2**18
"""Elements whose squares are summed in float32."""
REDUCE = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
"""What DeepSpeed calls with a full bucket, and when the backward pass is over."""


class Reducer:
    """Sums gradients where the ranks share memory, in place of DeepSpeed's buckets."""

    def __init__(self, zero: Any, world: World, memory: torch.Tensor | None, phases: Phases) -> None:
        """Take over from DeepSpeed's optimizer.

        Args:
            memory: of all ranks, from `staging`; None for a rank that is alone.
        """
        self._zero, self._world, self._phases = zero, world, phases
        self._turns = 0
        self._waiting: list[Any] = []
        self._elements = 0
        shape = _shape(world)
        self._capacity = shape[-1]
        if memory is not None:
            stage_bytes = math.prod(shape) * torch.float32.itemsize
            self._stage_HWRC = memory[:stage_bytes].view(torch.float32).view(shape)
            self._order_HW = memory[stage_bytes:].view(torch.int64).view(shape[:2])
        flat, offset = zero.grad_partitions_flat_buffer, 0
        self._own: dict[int, torch.Tensor] = {}
        self._groups: list[torch.Tensor] = []
        for group in zero.fp16_groups:
            start = offset
            for parameter in group:
                self._own[parameter.ds_id] = flat[offset : offset + parameter.partition_numel()]
                offset += parameter.partition_numel()
            self._groups.append(flat[start:offset])
        self._fresh = set(self._own)
        zero.reduce_independent_p_g_buckets_and_remove_grads = self.add
        setattr(zero, REDUCE, lambda _: self.flush())
        zero._get_norm_groups = self.norms
        zero._pre_step = self._before(zero._pre_step)
        zero._prepare_fp32_grad_for_sub_group = self._hand_over
        zero.unscale_and_clip_grads = partial(_clip, zero)

    def add(self, parameter: Any) -> None:
        """Take a parameter's gradient of this micro-step, in the same order on every rank."""
        if self._world.world_size == 1:
            self._sum(parameter, [parameter.grad.view(-1)])
            parameter.grad = None
            return
        self._waiting.append(parameter)
        self._elements += parameter.ds_numel
        if self._elements >= BUCKET:
            self.flush()

    def flush(self) -> None:
        """Sum what waits; collective."""
        with self._phases.phase("reduce"):
            self._flush()

    def _flush(self) -> None:
        for turn in self._cut():
            stage_WRC, order_W = self._stage_HWRC[self._turns % 2], self._order_HW[self._turns % 2]
            self._turns += 1
            self._write(turn, stage_WRC[self._world.rank])
            order_W[self._world.rank] = hash(tuple((p.ds_id, first, last) for p, first, last in turn))
            distributed.barrier()
            if len(set(order_W.tolist())) > 1:
                raise TrainError(
                    "the ranks have gradients of other parameters, or in another order: the model's layers are not "
                    "called alike on all; train it on one rank"
                )
            self._read(turn, stage_WRC[:, self._world.rank])
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting, self._elements = [], 0

    def _cut(self) -> Iterator[list[tuple[Any, int, int]]]:
        """Turns of (parameter, first, last) stretches of partitions, as many elements as there is room for."""
        turn: list[tuple[Any, int, int]] = []
        room = self._capacity
        for parameter in self._waiting:
            first, length = 0, parameter.partition_numel()
            while first < length:
                last = min(length, first + room)
                turn.append((parameter, first, last))
                room -= last - first
                first = last
                if not room:
                    yield turn
                    turn, room = [], self._capacity
        if turn:
            yield turn

    def _write(self, turn: list[tuple[Any, int, int]], stage_RC: torch.Tensor) -> None:
        for reader in range(self._world.world_size):
            if reader == self._world.rank:
                continue
            used = 0
            for parameter, first, last in turn:
                part = _part(parameter, reader, first, last)
                stage_RC[reader, used : used + len(part)].copy_(part)
                used += last - first

    def _read(self, turn: list[tuple[Any, int, int]], stage_WC: torch.Tensor) -> None:
        used = 0
        for parameter, first, last in turn:
            mine = _part(parameter, self._world.rank, first, last)
            parts = [stage_WC[writer, used : used + len(mine)] for writer in range(self._world.world_size)]
            parts[self._world.rank] = mine
            self._sum(parameter, parts, first, last)
            used += last - first

    def _sum(self, parameter: Any, parts: list[torch.Tensor], first: int = 0, last: int | None = None) -> None:
        """Add parts to a stretch of this rank's partition, or make it their sum for the first micro-step."""
        own = self._own[parameter.ds_id]
        whole = last is None or last == len(own)
        own = own[first : first + len(parts[0])]  # without padding
        if parameter.ds_id not in self._fresh:
            for part in parts:
                own += part
        elif len(parts) == 1:
            own.copy_(parts[0])
        else:
            torch.add(parts[0], parts[1], out=own)
            for part in parts[2:]:
                own += part
        if whole:
            self._fresh.discard(parameter.ds_id)

    def norms(self) -> list[torch.Tensor]:
        """The gradient's norm over all ranks; -1, as DeepSpeed has it, where it is not finite."""
        flat = self._zero.grad_partitions_flat_buffer
        if flat.is_cuda:
            squares = torch.linalg.vector_norm(flat).double().square()
        else:  # a sum of millions of squares would lose digits in float32
            squares = torch.stack([torch.dot(part, part) for part in flat.split(STRETCH)]).double().sum()
        if self._world.world_size > 1:
            distributed.all_reduce(squares)
        norm = squares.sqrt().float()
        return [torch.where(norm.isfinite(), norm, -1.0)]

    def _before(self, step: Callable[[], None]) -> Callable[[], None]:
        def begin() -> None:
            for unused in self._fresh:  # in no micro-batch of the step: what is there is an older step's
                self._own[unused].zero_()
            self._fresh = set(self._own)
            step()

        return begin

    def _hand_over(self, index: int) -> None:
        self._zero.fp32_partitioned_groups_flat[index].grad = self._groups[index]
        self._zero.averaged_gradients[index] = None


def _shape(world: World) -> tuple[int, int, int, int]:
    """Two halves, ranks that write, ranks that read, elements."""
    return 2, world.world_size, world.world_size, TURN // max(1, world.world_size - 1)


def staging(world: World) -> torch.Tensor | None:
    """Memory for a `Reducer`, collectively; None where the ranks cannot share any."""
    shape = _shape(world)
    return share(math.prod(shape) * torch.float32.itemsize + math.prod(shape[:2]) * torch.int64.itemsize, world)


def _part(parameter: Any, rank: int, first: int, last: int) -> torch.Tensor:
    """Elements of a gradient that belong to a stretch of a rank's partition; fewer where that has padding."""
    start, numel = rank * parameter.partition_numel(), parameter.ds_numel
    return parameter.grad.view(-1)[min(numel, start + first) : min(numel, start + last)]  # type: ignore[no-any-return]


def _clip(zero: Any, index: int, norm: torch.Tensor) -> None:
    """Scale a sub-group's gradient down to the largest norm allowed."""
    if zero.clip_grad > 0.0 and float(norm) > zero.clip_grad:
        zero.fp32_partitioned_groups_flat[index].grad.mul_(zero.clip_grad / (norm + 1e-6))
