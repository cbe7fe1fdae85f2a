"""Memory that all ranks of a host share: what one writes, the others see, with nothing sent between them."""

import mmap
import os
import secrets

import torch

from bigtune import dist
from bigtune.dist import World


def share(size: int, world: World) -> torch.Tensor | None:
    """Zeros, uint8 [size], in the same memory on every rank; collective.

    Rank 0 makes it, without a name that could be left behind, and the others open it by way of rank 0's process. It is
    gone when the last of them is. Memory is taken page by page, as it is written.

    Returns:
        None, on every rank, where one cannot see another's memory: on several hosts, in containers of their own.
    """
    if world.local_size != world.world_size or not hasattr(os, "memfd_create"):
        return None
    seal = secrets.token_bytes(16)
    mine = _make(size, seal) if world.is_main else None
    made, seal = dist.gather((mine, seal))[0]
    memory = _open(made, seal) if made else None
    together = dist.all_max(float(memory is None)) == 0.0
    if mine:
        os.close(mine[1])
    if memory is None or not together:
        return None
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def _make(size: int, seal: bytes) -> tuple[int, int] | None:
    """The process and the number of a file in memory that ends with `seal`."""
    try:
        number = os.memfd_create("bigtune")
        os.pwrite(number, seal, size)
    except OSError:
        return None
    return os.getpid(), number


def _open(made: tuple[int, int], seal: bytes) -> mmap.mmap | None:
    """The file of another process, if it is the one that is meant."""
    try:
        number = os.open(f"/proc/{made[0]}/fd/{made[1]}", os.O_RDWR)
        try:
            memory = mmap.mmap(number, 0)
        finally:
            os.close(number)
    except (OSError, ValueError):
        return None
    return memory if memory[-len(seal) :] == seal else None
