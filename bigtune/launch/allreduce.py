"""A short all-reduce of the first host with each other, and of all: `python -m bigtune.launch.allreduce`.

One rank a host. Rank 0 prints, as JSON, the bandwidth of each: bytes of the tensor that are reduced a second. A rank
that misses others says so by its exit code.
"""

import json
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from bigtune.dist import World
from bigtune.errors import BigtuneError
from bigtune.process import LOST_OTHERS
from bigtune.train.rendezvous import meet

MEBIBYTES = 16
ROUNDS = 3
LIMIT = timedelta(seconds=30)


def main() -> None:
    """Measure on every rank."""
    world = World.from_environment()
    tensor = torch.ones(MEBIBYTES * 2**18, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = _reduce(tensor, world, meet(world))
    except (BigtuneError, RuntimeError) as error:  # of the store, gloo or NCCL
        print(str(error).splitlines()[0], flush=True)
        sys.exit(LOST_OTHERS)
    if world.is_main:
        print(json.dumps({"gib_per_second": found}), flush=True)


def _reduce(tensor: torch.Tensor, world: World, store: Any) -> list[float]:
    backend = "nccl" if tensor.is_cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=LIMIT)
    found = [0.0] * world.world_size
    for other in range(1, world.world_size):
        pair = distributed.new_group([0, other], timeout=LIMIT)
        if world.rank in (0, other):
            found[other] = _speed(tensor, pair)
    found[0] = _speed(tensor, None)
    distributed.destroy_process_group()
    return found


def _speed(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> float:
    for turn in range(ROUNDS + 1):
        if turn == 1:
            began = time.monotonic()  # the first connects
        distributed.all_reduce(tensor, group=group)
        float(tensor[0])  # waits for the device
    return ROUNDS * tensor.numel() * 4 / 2**30 / (time.monotonic() - began)


if __name__ == "__main__":
    main()
