"""Cores, threads and memory: each worker of a host gets cores of its own, and keeps the memory that it has.

DeepSpeed's launcher leaves every rank all cores, and as many threads; two ranks on two cores then fight.
"""

import ctypes
import os
from collections.abc import Sequence

from bigtune.dist import World

ONEDNN_PRIMITIVES = "128"
"""Compiled products that oneDNN keeps on a CPU. Rows without padding have ever new shapes; with its 1,024 a small
model's worker grew to 6 GiB over 60 steps in bfloat16, where 128 keep it near 2 and cost no time."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
KEPT_BYTES = 2**30


def cores_of(world: World, cores: Sequence[int]) -> list[int]:
    """The cores of one worker: an even, contiguous share; one shared core where there are too few."""
    if world.local_size >= len(cores):
        return [cores[world.local_rank % len(cores)]]
    start = world.local_rank * len(cores) // world.local_size
    end = (world.local_rank + 1) * len(cores) // world.local_size
    return list(cores[start:end])


def bind(world: World) -> list[int]:
    """Bind this process to its cores, set its threads and bound oneDNN's cache; call it before torch is imported.

    A worker that is bound already (by numactl, srun or a batch system) keeps what it was given: it then has
    other cores than its parent.
    """
    mine = sorted(os.sched_getaffinity(0))
    if mine == sorted(os.sched_getaffinity(os.getppid())):
        mine = cores_of(world, mine)
        os.sched_setaffinity(0, mine)
    os.environ["OMP_NUM_THREADS"] = str(len(mine))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRIMITIVES)
    return mine


def keep_memory() -> None:
    """Have the C library keep what is freed, for the next tensor of that size.

    By itself it gives every large tensor's memory back at once, and the kernel then fills each page with zeros anew: a
    quarter of a step's time on a CPU. Only what is larger than `KEPT_BYTES` goes back. Nothing happens where the C
    library has no mallopt(3), or where another allocator is in its place.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
