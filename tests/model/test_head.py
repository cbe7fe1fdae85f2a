"""The chunked loss head computes what full logits and the losses of torch compute."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from bigtune.config import Loss
from bigtune.model import head
from bigtune.model.head import LossHead, full_logits_loss, replace_head
from bigtune.model.token_loss import Change

TOKENS, WIDTH, VOCABULARY = 11, 24, 53
WEIGHTS = (0.3, 1.0, 2.0, 0.0, 1.0, 0.7, 0.2, 2.5, 0.5, 0.1, 1.0)
PLAIN, NO_MORE = Change(), Loss()


def problem(
    dtype: torch.dtype, tokens: int = TOKENS, bias: bool = True
) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    return hidden, layer, torch.randint(VOCABULARY, (tokens,))


def by_head(
    dtype: torch.dtype, scale: float = 1.0, weights: Sequence[float] = WEIGHTS,
    change: Change = PLAIN, kind: Loss = NO_MORE, weighted: bool = True, **shape: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Loss and gradients of hidden states, weight and bias; the loss is scaled before backward."""
    hidden, layer, targets = problem(dtype, **shape)
    module = LossHead(layer, change, kind)
    loss, plain = module(hidden, targets, torch.tensor(weights[: len(targets)], dtype=torch.float32), weighted)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert not plain.requires_grad
    if kind == NO_MORE:
        assert torch.equal(plain, loss)
    (loss * scale).backward()
    return [loss.detach(), *(tensor.grad for tensor in (hidden, *layer.parameters()) if tensor.grad is not None)]


def by_full_logits(
    scale: float = 1.0, exact: torch.dtype = torch.float32, weights: Sequence[float] = WEIGHTS,
    change: Change = PLAIN, kind: Loss = NO_MORE, weighted: bool = True, **shape: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """The same by torch in one piece, from the values that `exact` rounds the problem to, computed in float64."""
    hidden, layer, targets = problem(exact, **shape)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, *layer.parameters())]
    logits = linear(*leaves) * change.scale
    if change.softcap is not None:
        logits = change.softcap * torch.tanh(logits / change.softcap)
    each = cross_entropy(logits, targets, reduction="none", label_smoothing=kind.label_smoothing)
    each = each + kind.z_loss * logits.logsumexp(-1).square()
    loss = (each * torch.tensor(weights).double()).sum()
    (loss * scale).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


KINDS = {
    "cohere": (Change(scale=0.3), NO_MORE),
    "gemma": (Change(softcap=0.5), NO_MORE),
    "scaled and capped": (Change(scale=3.0, softcap=1.0), NO_MORE),
    "smoothed": (PLAIN, Loss(label_smoothing=0.1)),
    "z-loss": (PLAIN, Loss(z_loss=0.05)),
    "all": (Change(scale=2.0, softcap=1.5), Loss(label_smoothing=0.2, z_loss=0.01)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chunk_tokens", [3, TOKENS])
def test_every_change_of_logits_and_loss_is_exact(
    name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk_tokens * VOCABULARY)
    change, kind = KINDS[name]
    wanted = by_full_logits(0.37, change=change, kind=kind)
    for one, other in zip(by_head(torch.float32, 0.37, change=change, kind=kind), wanted, strict=True):
        assert relative(one, other) < 2e-6
    # The mutation: a head without it.
    for one, other in zip(by_head(torch.float32, 0.37), wanted, strict=True):
        assert relative(one, other) > 2e-3


@pytest.mark.parametrize("name", KINDS)
def test_the_cross_entropy_is_told_beside_what_is_minimised(name: str) -> None:
    change, kind = KINDS[name]
    hidden, layer, targets = problem(torch.float32)
    weights = torch.tensor(WEIGHTS)
    _, plain = LossHead(layer, change, kind)(hidden, targets, weights)
    assert relative(plain, by_full_logits(change=change)[0]) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_full_logits_give_the_same(name: str) -> None:
    """What a model falls back to whose output layer is no plain linear one."""
    change, kind = KINDS[name]
    hidden, layer, targets = problem(torch.float32)
    logits = layer(hidden) * change.scale
    if change.softcap is not None:
        logits = change.softcap * torch.tanh(logits / change.softcap)
    loss, plain = full_logits_loss(logits, targets, torch.tensor(WEIGHTS), kind)
    assert not plain.requires_grad
    assert relative(plain, by_full_logits(change=change)[0]) < 1e-6
    loss.backward()
    found = [loss.detach(), *(tensor.grad for tensor in (hidden, *layer.parameters()) if tensor.grad is not None)]
    for one, other in zip(found, by_full_logits(change=change, kind=kind), strict=True):
        assert relative(one, other) < 2e-6


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, TOKENS, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_full_logits(
    chunk_tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk_tokens * VOCABULARY + 1)
    found, wanted = by_head(torch.float32, 0.37, bias=bias), by_full_logits(0.37, bias=bias)
    assert len(found) == len(wanted) == (4 if bias else 3)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert relative(one, other) < 1e-6


def test_a_vocabulary_larger_than_a_chunk_goes_one_position_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", VOCABULARY // 2)
    for one, other in zip(by_head(torch.float32), by_full_logits(), strict=True):
        assert relative(one, other) < 1e-6


def test_no_position_gives_zero_with_zero_gradients() -> None:
    """A rank with nothing supervised takes part all the same."""
    loss, *gradients = by_head(torch.float32, tokens=0)
    assert float(loss) == 0.0
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("chunk_tokens", [1, 4, TOKENS])
def test_bfloat16_is_within_its_own_rounding(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are rounded to 8 bits (a relative 2^-9) before the float32 cross-entropy: 1% bounds it here."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk_tokens * VOCABULARY)
    found, wanted = by_head(torch.bfloat16), by_full_logits(exact=torch.bfloat16)
    assert [tensor.dtype for tensor in found] == [torch.float32] + [torch.bfloat16] * 3
    assert relative(found[0], wanted[0]) < 1e-3
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert relative(one, other) < 1e-2


def test_large_logits_do_not_overflow() -> None:
    hidden, layer, targets = problem(torch.float32)
    loss, _ = LossHead(layer)((hidden * 1e4).detach(), targets, torch.ones(TOKENS))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_change_no_bit(dtype: torch.dtype) -> None:
    ones = [1.0] * TOKENS
    for one, other in zip(by_head(dtype, weights=ones), by_head(dtype, weights=ones, weighted=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_two_give_twice_the_loss_and_gradients_to_the_last_bit(dtype: torch.dtype) -> None:
    for one, two in zip(by_head(dtype, weights=[1.0] * TOKENS), by_head(dtype, weights=[2.0] * TOKENS), strict=True):
        assert torch.equal(2 * one, two)


def test_a_head_that_forgets_the_weights_would_fail() -> None:
    """The mutation: loss and every gradient depend on them."""
    for one, other in zip(by_head(torch.float32, weights=[1.0] * TOKENS), by_full_logits(), strict=True):
        assert relative(one, other) > 0.05


SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_keeps_the_models_own_parameters_under_their_names(tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    before = dict(model.named_parameters())
    module = replace_head(model)
    assert module is not None
    assert model.get_output_embeddings() is module
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert (module.weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"logit_scale": 0.0625}, Change(scale=0.0625)),
        ({"logits_scaling": 8.0}, Change(scale=0.125)),
        ({"logits_scaling": 1.0}, PLAIN),
        ({"final_logit_softcapping": 30.0}, Change(softcap=30.0)),
        ({"final_logit_softcapping": None}, PLAIN),
        ({}, PLAIN),
    ],
)
def test_what_a_model_does_to_its_logits_is_read_from_its_config(settings: dict[str, Any], change: Change) -> None:
    assert Change.of(LlamaConfig(**settings)) == change


def test_the_models_own_forward_pass_works_through_the_head() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    tokens = torch.randint(40, (1, 7))
    before = model(tokens).logits
    replace_head(model)
    assert torch.equal(model(tokens).logits, before)


def test_an_output_layer_that_is_not_plainly_linear_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * 2

    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.set_output_embeddings(Scaled(16, 40, bias=False))
    assert replace_head(model) is None
    assert type(model.get_output_embeddings()) is Scaled


def test_a_bias_of_the_output_layer_is_kept() -> None:
    model = PhiForCausalLM(PhiConfig(**SMALL))
    before = dict(model.named_parameters())
    made = replace_head(model)
    assert made is not None
    assert made.bias is before["lm_head.bias"]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
