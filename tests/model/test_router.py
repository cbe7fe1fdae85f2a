"""The auxiliary loss of routers: transformers' own for one document and one layer, and the same however it is cut."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from bigtune.errors import ModelError
from bigtune.model.router import aux_loss_factor, imbalance
from tests.tiny import tiny_family

EXPERTS, CHOSEN, OFFSETS = 6, 2, (0, 7, 8, 20)


def logits(layers: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(OFFSETS[-1], EXPERTS, requires_grad=True) for _ in range(layers)]


def test_it_is_transformers_loss_of_each_document_and_layer() -> None:
    found = imbalance(logits(), OFFSETS, CHOSEN)
    wanted = sum(
        (end - start) * load_balancing_loss_func((layer[start:end],), EXPERTS, CHOSEN) / 3
        for layer in logits()
        for start, end in pairwise(OFFSETS)
    )
    assert found.item() == pytest.approx(float(wanted), rel=1e-6)


def test_its_gradients_are_transformers_too() -> None:
    (ours,), (theirs,) = logits(1), logits(1)
    imbalance([ours], (0, OFFSETS[-1]), CHOSEN).backward()
    (OFFSETS[-1] * load_balancing_loss_func((theirs,), EXPERTS, CHOSEN)).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_documents_together_give_the_sum_of_each_alone() -> None:
    layers = logits()
    alone = [
        imbalance([layer[start:end] for layer in layers], (0, end - start), CHOSEN) for start, end in pairwise(OFFSETS)
    ]
    together = imbalance(layers, OFFSETS, CHOSEN)
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-6)
    as_one = imbalance(layers, (0, OFFSETS[-1]), CHOSEN)  # the mutation: over all documents at once
    assert abs(float(as_one) - float(together)) > 1e-2


def test_even_use_costs_as_many_as_are_chosen() -> None:
    even = torch.eye(EXPERTS).repeat(4, 1) * 20 + torch.eye(EXPERTS).roll(1, 0).repeat(4, 1) * 20
    assert float(imbalance([even], (0, len(even)), CHOSEN)) / len(even) == pytest.approx(CHOSEN, rel=1e-4)


def test_the_factor_is_the_run_files_or_the_configs(tmp_path: Path) -> None:
    routed = AutoModelForCausalLM.from_pretrained(tiny_family(tmp_path / "a", "mixtral", router_aux_loss_coef=0.02))
    dense = AutoModelForCausalLM.from_pretrained(tiny_family(tmp_path / "b", "llama"))
    assert aux_loss_factor(routed, None) == 0.02
    assert aux_loss_factor(routed, 0.5) == 0.5
    assert aux_loss_factor(routed, 0.0) == 0.0
    assert aux_loss_factor(dense, None) == 0.0
    with pytest.raises(ModelError, match=r"loss.router_aux_loss is 0.1, but a llama model has no experts"):
        aux_loss_factor(dense, 0.1)
