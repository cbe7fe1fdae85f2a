"""One rank of bigtune's step without ZeRO: what partitions, their sums and the waiting for other ranks cost.

deepspeed --num_accelerators N bare_rank.py WORK

The same model, attention, loss head, cores and kept memory, on the same rows. Each rank has the whole model to itself
and no gradient of another; its optimizer steps as many parameters as a partition has.
"""

import json
import os
import sys
import time
from pathlib import Path

from bigtune.dist import World, device
from bigtune.train.cores import bind, keep_memory

work = Path(sys.argv[-1])
case = json.loads((work / "case.json").read_text())
world = World.from_environment()
if not case["cuda"]:
    bind(world)
keep_memory()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from bigtune.config import Loss  # noqa: E402
from bigtune.data.loader import Loader  # noqa: E402
from bigtune.data.rows import Position  # noqa: E402
from bigtune.model.attention import documents  # noqa: E402
from bigtune.runfile import load_run  # noqa: E402
from bigtune.train.engine import connect  # noqa: E402
from bigtune.train.fit import open_rows  # noqa: E402
from bigtune.train.metrics import peak_memory_gib  # noqa: E402
from bigtune.train.objective import Objective  # noqa: E402

connect(world)
model = AutoModelForCausalLM.from_pretrained(str(work / "model"), dtype=getattr(torch, case["precision"]))
objective = Objective(model.to(device()), Loss())
objective.pack(True)
parts = [torch.nn.Parameter(p.detach().view(-1)[: -(-p.numel() // case["ranks"])].clone()) for p in model.parameters()]
optimizer = torch.optim.AdamW(parts, lr=1e-4, fused=True)
rows = open_rows(load_run(str(work / "run.yaml"), ()))
lines = []
with Loader(rows, Position(), world, case["micro_batch"], case["global_batch"]) as loader:
    for number in range(case["steps"]):
        counts = torch.zeros(3, device=device())
        for batch in loader.next().batches:
            with documents(batch.document_offsets.tolist()):
                loss, *_ = objective(batch)
                (loss / max(1, batch.supervised)).backward()
            counts += torch.tensor([batch.tokens, batch.supervised, loss.item()], device=device())
        for part, parameter in zip(parts, model.parameters(), strict=True):
            part.grad = parameter.grad.view(-1)[: part.numel()]
        optimizer.step()
        model.zero_grad()
        torch.distributed.all_reduce(counts)  # all end a step together, as those that learn together do
        tokens, supervised, losses = counts.tolist()
        line = {"tokens": tokens, "supervised_tokens": supervised, "loss": losses / supervised}
        lines.append(json.dumps({**line, "time": time.monotonic(), "peak_memory_gib": peak_memory_gib()}) + "\n")
        if world.is_main and number == 0:
            print("first step", flush=True)
if world.is_main:
    (work / "bare.jsonl").write_text("".join(lines))
torch.distributed.barrier()
os._exit(0)
