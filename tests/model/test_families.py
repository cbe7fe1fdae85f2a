"""Every model type that bigtune lets in: packed documents equal each alone, and the head equals the model's own."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from bigtune.model import attention
from bigtune.model.head import replace_head
from bigtune.model.load import EXACT
from bigtune.model.weights import saved_buffers

VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
}  # fmt: skip
# What makes a family what it is, at a size that documents of a dozen tokens reach.
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {
        "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5,
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5},
    "olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 5},
    "starcoder2": {"sliding_window": 5},
}  # fmt: skip
LENGTHS, OFFSETS = (7, 1, 12, 5), (0, 7, 8, 20, 25)


def models(model_type: str) -> tuple[Any, Any]:
    """The same random model with packed attention, and with transformers' own."""
    made = []
    for implementation in (attention.NAME, "eager"):
        # Each its own config: a model writes into it which attention it has, and asks it in every pass.
        config = AutoConfig.for_model(model_type, **SMALL, **OWN.get(model_type, {}))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms of one value only would hide a mix-up
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        made.append(model)
    packed, plain = made
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), plain.parameters(), strict=True))
    return packed, plain


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (1, OFFSETS[-1]))


def inputs() -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": tokens(), "position_ids": positions, "use_cache": False}


def alone(plain: Any) -> torch.Tensor:
    """Logits [S, V] of each document by itself."""
    return torch.cat([plain(tokens()[:, start:end]).logits[0] for start, end in pairwise(OFFSETS)])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("model_type", EXACT)
def test_packed_logits_and_gradients_are_those_of_each_document_alone(model_type: str) -> None:
    packed, plain = models(model_type)
    attention.kernels_used.clear()
    with attention.documents(OFFSETS):
        packed_SV = packed(**inputs()).logits[0]
        torch.manual_seed(2)
        direction_SV = torch.randn_like(packed_SV)
        (packed_SV * direction_SV).sum().backward()
    assert attention.kernels_used  # it was bigtune's attention, and no other
    alone_SV = alone(plain)
    (alone_SV * direction_SV).sum().backward()
    assert error(packed_SV, alone_SV) < 1e-5
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        gradient = wanted[name]
        assert (parameter.grad is None) == (gradient is None)
        if parameter.grad is not None and gradient is not None and float(gradient.norm()) > 1e-4:
            assert error(parameter.grad, gradient) < 1e-4, name


@pytest.mark.parametrize("model_type", EXACT)
def test_documents_that_mix_would_be_seen(model_type: str) -> None:
    """The mutation: all documents as one."""
    packed, plain = models(model_type)
    with torch.no_grad(), attention.documents((0, OFFSETS[-1])):
        assert error(packed(**inputs()).logits[0], alone(plain)) > 1e-2


@pytest.mark.parametrize("model_type", EXACT)
def test_the_loss_head_gives_the_loss_and_gradients_of_the_models_own_logits(model_type: str) -> None:
    packed, plain = models(model_type)
    predict_at_T = torch.tensor([3, 4, 5, 10, 22])
    targets_T = tokens()[0, predict_at_T + 1]
    weights_T = torch.tensor([1.0, 0.5, 1.0, 2.0, 0.25])
    assert not saved_buffers(packed)  # merge would have to carry them
    head = replace_head(packed)
    assert head is not None
    with attention.documents(OFFSETS):
        loss, _ = head(packed.base_model(**inputs())[0][0][predict_at_T], targets_T, weights_T)
        loss.backward()
    wanted = (cross_entropy(alone(plain)[predict_at_T], targets_T, reduction="none") * weights_T).sum()
    wanted.backward()
    assert error(loss, wanted) < 1e-5
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        gradient = gradients[name]
        if parameter.grad is not None and gradient is not None and float(gradient.norm()) > 1e-4:
            assert error(parameter.grad, gradient) < 1e-4, name


@pytest.mark.parametrize("model_type", [name for name in OWN if name in EXACT])
def test_what_makes_a_family_reaches_the_documents_of_these_tests(model_type: str, monkeypatch: Any) -> None:
    """Otherwise the tests above would show nothing of windows, caps and scales."""
    _, plain = models(model_type)
    monkeypatch.delitem(OWN, model_type)
    if model_type in ("mistral", "mixtral", "phi3", "starcoder2"):
        monkeypatch.setitem(OWN, model_type, {"sliding_window": None})
    elif "sliding_window" in AutoConfig.for_model(model_type, **SMALL).to_dict():
        monkeypatch.setitem(OWN, model_type, {"sliding_window": 64})
    _, without = models(model_type)
    with torch.no_grad():
        assert error(alone(without), alone(plain)) > 1e-3


def test_a_family_that_goes_round_the_attention_interface_would_be_seen() -> None:
    """The mutation: transformers lets Bloom through, and it would train silently wrong."""
    packed, plain = models("bloom")
    with torch.no_grad(), attention.documents(OFFSETS):
        assert error(packed(**inputs()).logits[0], alone(plain)) > 1e-2
