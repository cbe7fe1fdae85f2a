"""Rule 2: packing never mixes documents. Logits, hidden states and gradients are those of each one alone.

Shapes: S tokens of all documents, N documents, V vocabulary.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bigtune.errors import ModelError
from bigtune.model import attention
from bigtune.model.attention import documents, kernels_used, packed_attention
from bigtune.model.blocks import Asked, block_attention
from tests.tiny import VOCABULARY, tiny_llama

LENGTHS = (7, 1, 12, 5)
OFFSETS = (0, 7, 8, 20, 25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six query heads on three key heads; large weights, so that attention is far from uniform."""
    return tiny_llama(tmp_path_factory.mktemp("model"), initializer_range=0.3)


def load(folder: Path, implementation: str) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    assert model.config.num_attention_heads != model.config.num_key_value_heads
    return model


@pytest.fixture
def packed(folder: Path) -> LlamaForCausalLM:
    return load(folder, attention.NAME)


@pytest.fixture
def alone(folder: Path) -> LlamaForCausalLM:
    """Transformers' own plain attention."""
    return load(folder, "eager")


@pytest.fixture
def tokens_S() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(VOCABULARY, (sum(LENGTHS),))


def run(model: Any, tokens_S: torch.Tensor, offsets: tuple[int, ...] = OFFSETS) -> Any:
    """Logits and the hidden states of the packed sequence."""
    positions_S = torch.cat([torch.arange(length) for length in LENGTHS])
    with documents(offsets):
        return model(
            input_ids=tokens_S[None], position_ids=positions_S[None], use_cache=False, output_hidden_states=True
        )


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def each_alone_SV(model: Any, tokens_S: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(tokens_S[None, start:end]).logits[0] for start, end in pairwise(OFFSETS)])


def test_packed_logits_are_those_of_each_document_alone(
    packed: LlamaForCausalLM, alone: LlamaForCausalLM, tokens_S: torch.Tensor
) -> None:
    packed_SV, alone_SV = run(packed, tokens_S).logits[0], each_alone_SV(alone, tokens_S)
    for start, end in pairwise(OFFSETS):
        assert worst(packed_SV[start:end], alone_SV[start:end]) < 1e-5
    torch.testing.assert_close(packed_SV, alone_SV, rtol=1e-5, atol=1e-5)


def test_packed_gradients_are_the_sum_of_those_of_each_document_alone(
    packed: LlamaForCausalLM, alone: LlamaForCausalLM, tokens_S: torch.Tensor
) -> None:
    torch.manual_seed(2)
    weights_SV = torch.randn(len(tokens_S), VOCABULARY + 1)
    (run(packed, tokens_S).logits[0] * weights_SV).sum().backward()
    for start, end in pairwise(OFFSETS):
        (alone(tokens_S[None, start:end]).logits[0] * weights_SV[start:end]).sum().backward()
    wanted = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, parameter in packed.named_parameters():
        assert parameter.grad is not None
        assert wanted[name] is not None
        assert worst(parameter.grad, wanted[name]) < 1e-5, name


def test_one_document_of_all_would_mix(
    packed: LlamaForCausalLM, alone: LlamaForCausalLM, tokens_S: torch.Tensor
) -> None:
    """The mutation: the comparison above must see it."""
    mixed_SV, alone_SV = run(packed, tokens_S, (0, OFFSETS[-1])).logits[0], each_alone_SV(alone, tokens_S)
    assert worst(mixed_SV[:7], alone_SV[:7]) < 1e-5  # the first has nothing before it
    for start, end in list(pairwise(OFFSETS))[1:]:
        assert worst(mixed_SV[start:end], alone_SV[start:end]) > 1e-2


def test_other_documents_leave_no_trace_in_any_bit(packed: LlamaForCausalLM, tokens_S: torch.Tensor) -> None:
    """Each document is replaced in turn; hidden states of every layer stay what they were elsewhere."""
    before = run(packed, tokens_S).hidden_states
    for start, end in pairwise(OFFSETS):
        changed_S = tokens_S.clone()
        changed_S[start:end] = (changed_S[start:end] + 1) % VOCABULARY
        after = run(packed, changed_S).hidden_states
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[0, :start], new[0, :start])
            assert torch.equal(old[0, end:], new[0, end:])
            assert not torch.equal(old[0, start:end], new[0, start:end])


def tensors(length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)


def attend(qkv: tuple[torch.Tensor, ...], mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    query, key, value = qkv
    with documents((0, 1, 6)):
        return packed_attention(torch.nn.Identity(), query, key, value, mask, **options)[0]


@pytest.mark.parametrize(
    ("options", "asked", "kernel"),
    [
        ({}, Asked(), "sdpa"),
        ({"scaling": 0.3}, Asked(scale=0.3), "sdpa"),
        ({"sliding_window": 3}, Asked(window=3), "blocks"),
        ({"softcap": 2.0}, Asked(softcap=2.0), "blocks"),
        ({"s_aux": torch.ones(4)}, Asked(sinks_H=torch.ones(4)), "blocks"),
        ({"softcap": 2.0, "sliding_window": 3}, Asked(softcap=2.0, window=3), "blocks"),
    ],
    ids=["plain", "scaled", "window", "soft cap", "sinks", "soft cap in a window"],
)
def test_what_a_layer_asks_for_is_done_and_told(options: dict[str, Any], asked: Asked, kernel: str) -> None:
    qkv = tensors()
    kernels_used.clear()
    torch.testing.assert_close(attend(qkv, **options), block_attention(qkv, (0, 1, 6), asked).transpose(1, 2))
    assert kernels_used == {str(asked): kernel}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"is_causal": False}, "attention to later tokens"),
        ({"position_bias": torch.zeros(1)}, "a bias by position"),
        ({"indices": torch.zeros(1)}, "a choice of keys"),
        ({"mask": torch.zeros(6, 6)}, "a mask of its own"),
    ],
    ids=["bidirectional", "bias", "indices", "mask"],
)
def test_what_would_be_dropped_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=f"asks for {what}, which packed attention cannot do"):
        attend(tensors(), **options)


def test_a_window_that_no_document_reaches_changes_nothing() -> None:
    qkv = tensors()
    kernels_used.clear()
    plain = attend(qkv)
    assert plain.shape == (1, 6, 4, 8)
    assert torch.equal(plain, attend(qkv, sliding_window=5))
    assert kernels_used == {"plain": "sdpa"}


def test_documents_are_never_guessed() -> None:
    with pytest.raises(ValueError, match="a sequence of 6 tokens, and documents at None"):
        packed_attention(torch.nn.Identity(), *tensors(), None)
    with documents([0, 5]), pytest.raises(ValueError, match=r"a sequence of 6 tokens, and documents at \(0, 5\)"):
        packed_attention(torch.nn.Identity(), *tensors(), None)
