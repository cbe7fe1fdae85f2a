"""The copy of a rank's state that is written while the training goes on."""

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from bigtune import dist
from bigtune.checkpoint.save import content_of
from bigtune.dist import World
from bigtune.host import free_memory
from bigtune.model.shards import memory_of
from bigtune.tensorfile import PAGE, in_order

SPARE = 0.8
"""Of the memory that is free, what copies may take: the training's own needs rise and fall."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Tensors in the host's memory, and the bytes of all, end to end as a file has them."""

    tensors: Mapping[str, torch.Tensor]
    image: memoryview


class Staging:
    """Host memory for one copy, used again by every save: its pages are new only once."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> Copy:
        """A copy of each tensor; valid until the next call."""
        self._grow(_room_for(tensors), any(tensor.is_cuda for tensor in tensors.values()))
        image = self._memory[-self._memory.data_ptr() % PAGE :]
        copies, start = dict[str, torch.Tensor](), 0
        for name in in_order({name: content_of(tensor) for name, tensor in tensors.items()}):
            tensor = tensors[name]
            copies[name] = image[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
            start += tensor.nbytes
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Copy(copies, memory_of(image))

    def fits(self, tensors: Mapping[str, torch.Tensor], world: World) -> bool:
        """Whether there is memory for a copy on every rank's host, collectively."""
        more = max(0, _room_for(tensors) - len(self._memory))
        return dist.all_max(float(more * world.local_size > SPARE * free_memory())) == 0.0

    def _grow(self, size: int, pinned: bool) -> None:
        if len(self._memory) < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # gives the old one back first
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else _in_huge_pages(size)


def _in_huge_pages(size: int) -> torch.Tensor:
    """Where the system has such pages: with small ones, on a virtual machine, every later step took 15% longer."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _room_for(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes, with a page more at either end."""
    return sum(tensor.nbytes for tensor in tensors.values()) + 2 * PAGE
