"""One rank of TRL's SFTTrainer, packing its documents, under ZeRO-3; it needs nothing of bigtune.

deepspeed --num_accelerators N trl_rank.py WORK
"""

import json
import os
import sys
import time
from pathlib import Path

work = Path(sys.argv[-1])
case = json.loads((work / "case.json").read_text())
cores, rank = sorted(os.sched_getaffinity(0)), int(os.environ["LOCAL_RANK"])
if not case["cuda"]:  # the same cores and threads as bigtune's workers
    mine = cores[rank * len(cores) // case["ranks"] : (rank + 1) * len(cores) // case["ranks"]]
    os.sched_setaffinity(0, mine)
    os.environ["OMP_NUM_THREADS"] = str(len(mine))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
bfloat16 = case["precision"] == "bfloat16"
batches = case["global_batch"] // case["ranks"] // case["micro_batch"]
arguments = SFTConfig(
    output_dir=f"{work}/trl", packing=True, max_length=case["sequence_length"], max_steps=case["steps"],
    per_device_train_batch_size=case["micro_batch"], gradient_accumulation_steps=batches, learning_rate=1e-4,
    lr_scheduler_type="constant", optim="adamw_torch_fused", bf16=bfloat16, use_cpu=not case["cuda"],
    gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    max_grad_norm=1.0, model_init_kwargs={"dtype": case["precision"]},
    deepspeed={
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    },
)  # fmt: skip
seen: list[tuple[int, int]] = []
ends: list[float] = []
losses: list[float] = []


class Clock(TrainerCallback):
    """When each step ended."""

    def on_step_end(self, *_, **__):
        ends.append(time.monotonic())
        if rank == 0 and len(ends) == 1:
            print("first step", flush=True)

    def on_log(self, *_, logs=None, **__):
        if "loss" in (logs or {}):
            losses.append(float(logs["loss"]))


trainer = SFTTrainer(
    str(work / "model"),
    args=arguments,
    train_dataset=load_dataset(
        "parquet", data_files=str(work / "documents.parquet"), split="train", cache_dir=f"{work}/cache"
    ),
    processing_class=AutoTokenizer.from_pretrained(str(work / "model")),
    callbacks=[Clock()],
)
collate = trainer.data_collator


def counted(rows):
    batch = collate(rows)
    seen.append((batch["input_ids"].numel(), int((batch["labels"] != -100).sum())))  # without padding: all are real
    return batch


trainer.data_collator = counted
trainer.train()
counts = torch.tensor(seen[: case["steps"] * batches]).view(case["steps"], batches, 2).sum(1)
counts = counts.cuda() if case["cuda"] else counts
peak = torch.cuda.max_memory_allocated() / 2**30 if case["cuda"] else 0.0
torch.distributed.all_reduce(counts)
if rank == 0:
    lines = [
        {"tokens": tokens, "supervised_tokens": supervised, "loss": loss, "time": end, "peak_memory_gib": peak}
        for (tokens, supervised), loss, end in zip(counts.tolist(), losses, ends, strict=True)
    ]
    (work / "trl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
torch.distributed.barrier()
os._exit(0)
