"""One rank of DeepSpeed's ZeRO-3, which saves a model by DeepSpeed and by bigtune: started by merge_run.py.

Plain SGD keeps no state beside the float32 values, so that checkpoints of a large model fit a small machine.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bigtune.checkpoint.disks import find_disks
from bigtune.checkpoint.layout import MASTER, Layout, SubGroup
from bigtune.checkpoint.save import Where, save
from bigtune.dist import World
from bigtune.train import zero3

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 172, "num_attention_heads": 4},
    "400M": {"hidden_size": 1024, "num_hidden_layers": 26, "intermediate_size": 2816, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 5504, "num_attention_heads": 16},
}
VOCABULARY = 32_000


def main(size: str, theirs: Path, ours: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and is for inference alone
    deepspeed.init_distributed("gloo")
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16", **SHAPES[size])
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = LlamaForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        master.data.mul_(1.001)  # as after training: float32 values, which are not those in bfloat16
    engine.save_checkpoint(str(theirs), tag="step")
    world = World.from_environment()
    if world.is_main:
        config.save_pretrained(theirs)
        print(f"{sum(parameter.ds_numel for parameter in model.parameters()) / 1e6:.0f}M", flush=True)
    tensors, parts = dict[str, torch.Tensor](), list[SubGroup]()
    for index, (parameters, master, _) in enumerate(zero3.groups(engine.optimizer, names)):
        tensors[f"{index}.{MASTER}"] = master.detach()
        parts.append(SubGroup(index, str(index), master.numel(), parameters, {}, {}))
    layout = Layout(world.world_size, "bfloat16", tuple(parts), {}, {})
    where = Where(ours, world, find_disks(ours, world))
    save(where, 1, layout, tensors, {}, {"config.json": config.to_json_string().encode()})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
