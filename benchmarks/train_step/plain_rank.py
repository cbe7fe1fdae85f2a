"""One rank of the plain loop: transformers' model and loss, DeepSpeed's ZeRO-3, torch's AdamW.

deepspeed --num_accelerators N plain_rank.py WORK
"""

import json
import os
import sys
import time
from pathlib import Path

from bigtune.dist import World
from bigtune.train.cores import bind

work = Path(sys.argv[-1])
case = json.loads((work / "case.json").read_text())
if not case["cuda"]:
    bind(World.from_environment())

import deepspeed  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.deepspeed import HfDeepSpeedConfig  # noqa: E402

from bigtune.data.loader import Loader  # noqa: E402
from bigtune.data.rows import Position  # noqa: E402
from bigtune.dist import device  # noqa: E402
from bigtune.runfile import load_run  # noqa: E402
from bigtune.train.engine import connect  # noqa: E402
from bigtune.train.fit import open_rows  # noqa: E402
from bigtune.train.metrics import peak_memory_gib  # noqa: E402

world = World.from_environment()
connect(world)
config = {
    "train_micro_batch_size_per_gpu": case["micro_batch"],
    "gradient_accumulation_steps": case["global_batch"] // case["ranks"] // case["micro_batch"],
    "bf16": {"enabled": case["precision"] == "bfloat16"},
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}
alive = HfDeepSpeedConfig(config)
model = AutoModelForCausalLM.from_pretrained(str(work / "model"), dtype=getattr(torch, case["precision"]))
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), config=config)
rows = open_rows(load_run(str(work / "run.yaml"), ()))
lines = []
with Loader(rows, Position(), world, case["micro_batch"], case["global_batch"]) as loader:
    for number in range(case["steps"]):
        counts = torch.zeros(3)
        for batch in loader.next().batches:
            ids, places = (torch.from_numpy(array)[None] for array in (batch.input_ids, batch.position_ids))
            labels = torch.full_like(ids, -100)
            labels[0, torch.from_numpy(batch.predict_at) + 1] = torch.from_numpy(batch.targets)
            ids, places, labels = (tensor.to(device()) for tensor in (ids, places, labels))
            loss = engine(input_ids=ids, position_ids=places, labels=labels, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            counts += torch.tensor([batch.tokens, batch.supervised, loss.item() * batch.supervised])
        counts = counts.to(device())
        torch.distributed.all_reduce(counts)
        tokens, supervised, losses = counts.tolist()
        line = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "loss": losses / supervised,
            "time": time.monotonic(),
            "peak_memory_gib": peak_memory_gib(),
        }
        lines.append(json.dumps(line) + "\n")
        if world.is_main and number == 0:
            print("first step", flush=True)
if world.is_main:
    (work / "plain.jsonl").write_text("".join(lines))
torch.distributed.barrier()
os._exit(0)
