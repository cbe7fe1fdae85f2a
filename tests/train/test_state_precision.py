"""Which states have 8 bits, asked of the live optimizer of every rank: peers' rule for embeddings is matched by object
identity, which flattening into partitions breaks, so that their embeddings silently get 8 bits."""

from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Optim
from bigtune.data.collate import collate
from bigtune.dist import World
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_run
from tests.train.test_loss import ALIKE

KINDS = {"adamw_8bit": {"state1", "state2"}, "lion_8bit": {"state1"}}


def live_states(folder: Path, preset: str, name: Any) -> dict[str, dict[str, str]]:
    """After one step on this rank: parameter → kind of state → its dtype, as bitsandbytes holds it."""
    world = World.from_environment()
    optim = Optim(name=name)
    engine = Engine(folder, optim, complete(read_preset(preset), tiny_run(folder), "float32", 36), "float32", world)
    batch = collate([ALIKE[world.rank]])
    engine.micro_step(batch, 1.0, 1, last=True)
    assert engine.step(1e-3)
    steppers = engine.base_optimizer.state
    return {
        parameter.name: {
            kind: str(tensor.dtype) for kind, tensor in steppers[part.master].items() if kind.startswith("state")
        }
        for part in engine.partitions()
        for parameter in part.parameters
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("preset", "name"), [("zero3", "adamw_8bit"), ("zero3", "lion_8bit"), ("zero2", "adamw_8bit")])
def test_matrices_have_8_bits_and_all_else_32_on_every_rank(tmp_path: Path, preset: str, name: str, ranks: int) -> None:
    folder = tiny_llama(tmp_path, tied=False, attention_bias=True)
    for states in run_distributed(live_states, ranks, folder, preset, name):
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.bias"} <= states.keys()
        for parameter, found in states.items():
            kept = "embed" in parameter or "lm_head" in parameter or "norm" in parameter or "bias" in parameter
            assert found == dict.fromkeys(KINDS[name], "torch.float32" if kept else "torch.uint8"), parameter
