"""A short all-reduce of the first host with each other, and of all: `python -m bigtune.launch.allreduce`.

One rank a host. Rank 0 prints, as JSON, the bandwidth of each: bytes of the tensor that are reduced a second.
"""

import json
import os
import time
from datetime import timedelta

import torch
from torch import distributed

MEBIBYTES = 16
ROUNDS = 3
LIMIT = timedelta(seconds=60)


def main() -> None:
    """Measure on every rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=LIMIT)
    tensor = torch.ones(MEBIBYTES * 2**18, device="cuda" if cuda else "cpu")
    found = {}
    for other in range(1, world):
        pair = distributed.new_group([0, other], timeout=LIMIT)
        if rank in (0, other):
            found[other] = _speed(tensor, pair)
    found[0] = _speed(tensor, None)
    if rank == 0:
        print(json.dumps({"gib_per_second": [found[place] for place in range(world)]}), flush=True)
    distributed.destroy_process_group()


def _speed(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> float:
    for turn in range(ROUNDS + 1):
        if turn == 1:
            began = time.monotonic()  # the first connects
        distributed.all_reduce(tensor, group=group)
        float(tensor[0])  # waits for the device
    return ROUNDS * tensor.numel() * 4 / 2**30 / (time.monotonic() - began)


if __name__ == "__main__":
    main()
