"""A model of a type that no test holds is looked at before it trains: packed where that is exact, apart where not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bigtune.config import Optim
from bigtune.data.collate import collate
from bigtune.data.rows import Row
from bigtune.dist import World
from bigtune.errors import ModelError
from bigtune.model.load import EXACT
from bigtune.train import probe
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_family, tiny_run
from tests.train.test_families import OWN, reference, rows
from tests.train.test_loss import Gradients, worst

HYBRID: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}  # of LFM2: a convolution carries state
LONGEST = 40


def train_on_rank(
    folder: Path, ranks_rows: Sequence[Sequence[Row]], exact: Sequence[str]
) -> tuple[list[str], str, Gradients]:
    """What was said, the error that a user would see, and full gradients of one global batch."""
    from deepspeed.utils import safe_get_full_grad

    world, said = World.from_environment(), list[str]()
    run = tiny_run(folder, optim__max_grad_norm=0.0)
    engine = Engine(folder, Optim(), complete(read_preset("zero3"), run, "float32", 36), "float32", world)
    try:
        with mock.patch.object(probe, "EXACT", exact):
            probe.prove(engine, LONGEST, said.append)
    except ModelError as error:
        return said, str(error), {}
    whole = collate([row for mine in ranks_rows for row in mine])
    mine = ranks_rows[world.rank]
    for index, row in enumerate(mine):
        engine.micro_step(collate([row]), whole.weight, whole.tokens, last=index == len(mine) - 1)
    return said, "", {name: safe_get_full_grad(p).float().numpy().copy() for name, p in engine.parameters.items()}


def on_two(folder: Path, exact: Sequence[str] = ()) -> tuple[list[str], str, Gradients]:
    """On two ranks, of which each has another number of documents in each micro-step."""
    first, second, third, fourth = rows()
    one: tuple[list[str], str, Gradients]
    one, other = run_distributed(train_on_rank, 2, folder, [[first, third], [second, fourth]], exact, seconds=600)
    assert one[:2] == other[:2]
    return one


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_model_that_packs_exactly_goes_on_packing(model_type: str, tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, model_type, experts=12, **OWN.get(model_type, {}))
    said, error, gradients = on_two(folder)
    assert (said, error) == ([], "")
    assert worst(gradients, reference(folder)[0]) < 1e-4


def test_a_hybrid_computes_document_by_document(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "lfm2", **HYBRID)
    said, error, gradients = on_two(folder)
    assert error == ""
    (line,) = said
    assert "a lfm2 model cannot keep packed documents apart (what it gives changes by" in line
    assert worst(gradients, reference(folder)[0]) < 1e-4


def test_a_hybrid_that_packs_would_train_on_mixed_documents(tmp_path: Path) -> None:
    """The mutation: no probe, as if a test had held it."""
    folder = tiny_family(tmp_path, "lfm2", **HYBRID)
    said, _, gradients = on_two(folder, exact=[*EXACT, "lfm2"])
    assert not said
    assert worst(gradients, reference(folder)[0]) > 1e-2


def test_positions_that_turn_by_the_longest_document_are_found_in_any_type(tmp_path: Path) -> None:
    """Phi-3's long RoPE has other factors for sequences beyond its original context, here of 32 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [4.0] * 3,
            "original_max_position_embeddings": 32}  # fmt: skip
    folder = tiny_family(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=32)
    said, error, gradients = on_two(folder, exact=EXACT)
    assert error == ""
    assert "a phi3 model cannot keep packed documents apart" in said[0]
    assert worst(gradients, reference(folder)[0]) < 1e-4


@pytest.mark.parametrize(
    "model_type", ["bloom", *(pytest.param(name, marks=pytest.mark.slow) for name in ("doge", "gptj"))]
)
def test_attention_that_goes_its_own_way_is_found(model_type: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "bloom": {}, "doge": {"router_aux_loss_coef": 0.0},
        "gptj": {"n_embd": 36, "n_head": 6, "n_layer": 2, "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    }[model_type]  # fmt: skip
    folder = tiny_family(tmp_path, model_type, **changes)
    said, error, gradients = on_two(folder)
    assert error == ""
    assert f"a {model_type} model cannot keep packed documents apart" in said[0]
    assert worst(gradients, reference(folder)[0]) < 1e-4


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    said, error, _ = on_two(tiny_family(tmp_path, "bert"))
    assert "the bert model sees the tokens that it should learn to predict; give a decoder" in error
    assert not said


def test_a_head_that_gives_other_logits_gives_way_to_the_models_own(tmp_path: Path) -> None:
    """BERT as a decoder has a layer more between its hidden states and its output layer."""
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = tiny_family(tmp_path, "bert", is_decoder=True, **dropout)
    said, error, gradients = on_two(folder)
    assert error == ""
    assert "the output of a bert model is none that the loss head knows" in said[-1]
    wanted = reference(folder)[0]
    for name in list(wanted):
        if "key.bias" in name:  # shifts all scores of a query alike, so that its gradient is rounding and nothing else
            del wanted[name], gradients[name]
    assert worst(gradients, wanted) < 1e-4


class Scaled(torch.nn.Linear):
    """An output layer that is no plain one."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def test_an_output_layer_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    from bigtune.model.head import replace_head
    from bigtune.model.load import skeleton

    model = skeleton(tiny_family(tmp_path, "llama"), torch.float32)
    with torch.device("meta"):
        model.set_output_embeddings(Scaled(36, 321))
    assert replace_head(model) is None
    assert isinstance(model.get_output_embeddings(), Scaled)
