"""One rank of DeepSpeed's own save: the model of the benchmark, trained one step, saved three times and flushed."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from bigtune.config import Optim
from bigtune.dist import World
from bigtune.model.load import read_config
from bigtune.runfile import resolve
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine, connect
from bigtune.train.probe import _of

model, folder, result = map(Path, sys.argv[1:4])
precision = sys.argv[4]
world = World.from_environment()
connect(world)
tree = {
    "model": {"path": str(model)}, "data": {"sources": [{"path": "none"}]}, "train": {"steps": 1, "global_batch": 2},
    "output": str(folder),
}  # fmt: skip
config = complete(read_preset("zero3"), resolve(tree), precision, read_config(model).hidden_size)
engine = Engine(model, Optim(), config, precision, world)
batch = _of(torch.randint(300, (128,)).numpy())
engine.micro_step(batch, 1.0, 128, last=True)
engine.step(1e-5)
seconds = []
for number in range(3):
    distributed.barrier()
    began = time.monotonic()
    engine._engine.save_checkpoint(str(folder), tag=str(number))
    for path in (folder / str(number)).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    distributed.barrier()
    seconds.append(round(time.monotonic() - began, 2))
    size = sum(path.stat().st_size for path in (folder / str(number)).iterdir())
    distributed.barrier()
    if world.is_main:
        shutil.rmtree(folder / str(number))
if world.is_main:
    result.write_text(json.dumps({"seconds": seconds, "gb": round(size / 1e9, 3)}))
os._exit(0)
