"""Families under ZeRO-3: gradients on any ranks are those of transformers alone, experts and routers included."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from bigtune.config import Loss, Optim
from bigtune.data.collate import collate
from bigtune.data.rows import Row
from bigtune.dist import World
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.stores import document
from tests.tiny import VOCABULARY, tiny_family, tiny_run
from tests.train.test_loss import Gradients, worst

FACTOR = 0.3
EXPERTS = 12
"""So many that the few tokens of a rank's rows leave some of them out."""

WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3_text": WINDOWS,
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0},
    "mistral": {"sliding_window": 5},
    "mixtral": {"router_aux_loss_coef": FACTOR},
    "olmo2": {},
    "phi": {"num_attention_heads": 9, "head_dim": 4},
    "qwen3": {},
    "qwen3_moe": {"router_aux_loss_coef": FACTOR},
}


def rows() -> list[Row]:
    random = np.random.default_rng(0)
    lengths = [[(9, 4), (3, 1)], [(4, 2)], [(11, 5)], [(2, 1), (7, 0)]]
    made = [[document(random.integers(2, VOCABULARY, n).tolist(), (n - k, n)) for n, k in row] for row in lengths]
    return [Row(tuple(range(len(row))), tuple(row)) for row in made]


def step_on_rank(
    folder: Path, ranks_rows: Sequence[Sequence[Row]], precision: str = "float32"
) -> tuple[Gradients, Gradients]:
    """Full gradients of one global batch, a row a micro-batch, and full parameters after a step with them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    world = World.from_environment()
    run = tiny_run(folder, optim__max_grad_norm=0.0)
    # An epsilon above the gradients: Adam's first step is then smooth in them, as SGD's.
    engine = Engine(folder, Optim(epsilon=1.0), complete(read_preset("zero3"), run, precision, 36), precision, world)
    whole = collate([row for mine in ranks_rows for row in mine])
    mine = ranks_rows[world.rank]
    for index, row in enumerate(mine):
        engine.micro_step(collate([row]), whole.weight, whole.tokens, last=index == len(mine) - 1)
    gradients = {name: safe_get_full_grad(p).float().cpu().numpy().copy() for name, p in engine.parameters.items()}
    engine.step(0.1)
    return gradients, {name: safe_get_full_fp32_param(p).cpu().numpy().copy() for name, p in engine.parameters.items()}


def reference(
    folder: Path, one_layer_at_a_time: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Gradients, list[set[int]]]:
    """The gradient from transformers alone, a document at a time, and the experts that each row went to."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    whole, used = collate(rows()), []
    for row in rows():
        experts: set[int] = set()
        for one in row.documents:
            ids = torch.from_numpy(one.input_ids).long()[None]
            routed = {"output_router_logits": True} if "router_aux_loss_coef" in model.config.to_dict() else {}
            output = model(ids, **routed)
            losses = cross_entropy(output.logits[0, :-1].float(), ids[0, 1:], reduction="none")
            loss = sum((losses[max(s, 1) - 1 : e - 1].sum() for s, e in one.spans.tolist()), losses.sum() * 0.0)
            loss = loss / whole.weight
            if routed and output.router_logits:
                layers = [(layer,) for layer in output.router_logits]
                for layer in layers if one_layer_at_a_time else [output.router_logits]:
                    aux = load_balancing_loss_func(layer, EXPERTS, model.config.num_experts_per_tok)
                    share = 1 / len(layers) if one_layer_at_a_time else 1.0
                    loss = loss + FACTOR * share * aux * ids.numel() / whole.tokens
                experts |= set(output.router_logits[0].topk(model.config.num_experts_per_tok).indices.unique().tolist())
            loss.backward()
        used.append(experts)
    return {name: parameter.grad.float().numpy() for name, parameter in model.named_parameters()}, used


QUICK = ("cohere", "gemma2", "gpt2", "mixtral", "qwen3")


@pytest.fixture(
    scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OWN]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(tmp_path_factory.mktemp("family"), request.param, experts=EXPERTS, **OWN[request.param])


def test_a_step_on_two_ranks_is_a_step_on_one_and_its_gradient_that_of_transformers(folder: Path) -> None:
    first, second, third, fourth = rows()
    wanted, used = reference(folder)
    if used[0]:  # else no rank would have had experts of its own
        assert used[0] | used[2] != used[1] | used[3]
    ((alone, after),) = run_distributed(step_on_rank, 1, folder, [rows()])
    both = run_distributed(step_on_rank, 2, folder, [[first, third], [second, fourth]])
    for gradients, stepped in ((alone, after), *both):
        assert worst(gradients, wanted) < 1e-4
        assert worst(stepped, after) < 1e-6
    # The mutation: without the step, they are further apart than that.
    before = {name: p.detach().numpy() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert worst(before, after) > 1e-3


def test_routers_learn_nothing_of_the_auxiliary_loss_where_it_is_left_out(tmp_path: Path) -> None:
    """The mutation of the test above; and layers taken together, as transformers has them, are not the same either."""
    folder = tiny_family(tmp_path, "mixtral", experts=EXPERTS, router_aux_loss_coef=0.0)
    ((without, _),) = run_distributed(step_on_rank, 1, folder, [rows()])
    wanted, _ = reference(folder)
    assert worst(without, wanted) > 1e-2
    together, _ = reference(folder, one_layer_at_a_time=False)
    assert worst(together, wanted) > 1e-3
    assert Loss(router_aux_loss=FACTOR).router_aux_loss == FACTOR
