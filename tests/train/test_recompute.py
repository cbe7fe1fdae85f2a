"""Layers whose activations are computed again learn the same, and keep less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bigtune.config import Optim
from bigtune.data.collate import collate
from bigtune.dist import World
from bigtune.errors import ModelError
from bigtune.model import attention
from bigtune.model.recompute import checkpoint_activations
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.memory import Memory
from tests.distributed import run_distributed
from tests.model.test_families import OFFSETS, OWN, SMALL, inputs
from tests.tiny import VOCABULARY, tiny_run
from tests.train.test_loss import ALIKE
from tests.training import memory as shared_or_not

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
}


@pytest.fixture(scope="module", params=["llama", "gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = FAMILIES[request.param] | {"vocab_size": VOCABULARY + 1, "num_hidden_layers": 4}
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SMALL | changes)).save_pretrained(folder)
    return folder


def learnt(folder: Path, every: str | int, threshold: int | None, precision: str) -> dict[str, Any]:
    """On each rank: losses, gradient norms and weights of three steps, and what the forward pass keeps, in bytes.

    `threshold` is as in `zero3_gradients`.
    """
    world = World.from_environment()
    preset = read_preset("zero3")
    if threshold is not None:
        preset["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    config = complete(preset, tiny_run(folder), precision, 32)
    with shared_or_not(threshold is None):
        engine = Engine(folder, Optim(), config, precision, world, activation_checkpointing=every)
    memory = Memory(engine, 1)
    losses, norms = [], []
    for number in range(3):
        for index in range(2):
            torch.manual_seed(7 * number + index)
            batch = collate([ALIKE[(2 * index + world.rank) % len(ALIKE)]])
            with memory.micro_step(batch):
                losses.append(float(engine.micro_step(batch, 48.0, 204, last=index == 1)))
        held = [p.ds_status.name for p in engine.parameters.values()]  # type: ignore[attr-defined]
        assert threshold != 0 or set(held) == {"NOT_AVAILABLE"}  # nothing stays gathered
        assert engine.step(1e-3)
        norms.append(engine.grad_norm)
    weights = torch.cat([part.master.detach().clone() for part in engine.partitions()])
    return {"learnt": (losses, norms, weights.numpy().tobytes()), "kept": memory.first()["activations"]}


@pytest.mark.parametrize(
    ("ranks", "threshold", "precision"), [(1, None, "bfloat16"), (2, 0, "float32"), (2, None, "float32")]
)
def test_what_is_computed_again_is_the_same_to_the_last_bit(
    folder: Path, ranks: int, threshold: int | None, precision: str
) -> None:
    """Dropout, in GPT-2, included. Parameters are gathered again, where they are not held whole."""
    found = {
        every: run_distributed(learnt, ranks, folder, every, threshold, precision) for every in ("none", 2, "full")
    }
    for rank in range(ranks):
        none, half, full = (found[every][rank] for every in ("none", 2, "full"))
        assert none["learnt"] == half["learnt"] == full["learnt"]
        assert full["kept"] < half["kept"] < none["kept"]
        norms = none["learnt"][1]
        assert norms[0] != norms[1] > 0  # it is about something


def test_a_frozen_embedding_is_no_trap() -> None:
    """As under LoRA: the reentrant kind would give the layers no gradient, since their input needs none."""
    gradients = []
    for every in ("none", "full"):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SMALL | OWN.get("llama", {}))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).train()
        model.get_input_embeddings().weight.requires_grad_(False)
        assert checkpoint_activations(model, every) == (2 if every == "full" else 0)
        with attention.documents(OFFSETS):
            model(**inputs()).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_every_kth_layer_from_the_first_on() -> None:
    config = AutoConfig.for_model("llama", **SMALL | {"num_hidden_layers": 5})
    model = AutoModelForCausalLM.from_config(config)
    assert checkpoint_activations(model, 2) == 3
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False, True]


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"train\.activation_checkpointing: transformers knows no layer"):
        checkpoint_activations(torch.nn.Sequential(torch.nn.Linear(2, 2)), "full")
