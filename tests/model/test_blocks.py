"""Attention by blocks is the softmax over each document's keys that textbooks write down, for all that a layer asks."""

from typing import Any

import pytest
import torch

from bigtune.model import blocks
from bigtune.model.blocks import Asked, block_attention

HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 6, 3, 8, 5
OFFSETS = (0, 7, 8, 31, 36)

ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window of all": {"window": 100},
    "soft cap": {"softcap": 1.5},
    "soft cap in a window": {"softcap": 1.5, "window": 4, "scale": 2.0},
    "sinks": {},
    "sinks in a window": {"window": 4},
}


def inputs() -> list[torch.Tensor]:
    """Queries, keys, values and sinks."""
    torch.manual_seed(0)
    shapes = ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, VALUE_SIZE))
    qkv = [torch.randn(1, heads, OFFSETS[-1], size) * 2 for heads, size in shapes]
    return [tensor.requires_grad_() for tensor in (*qkv, torch.randn(HEADS))]


def dense(tensors: list[torch.Tensor], asked: Asked) -> torch.Tensor:
    """One softmax over the whole sequence, with a mask for everything that a query does not see."""
    query, key, value, sinks_H = tensors
    key, value = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * (SIZE**-0.5 if asked.scale is None else asked.scale)
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    at = torch.arange(OFFSETS[-1])
    document = torch.bucketize(at, torch.tensor(OFFSETS[1:]), right=True)
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if asked.window is not None:
        seen &= at[:, None] - at < asked.window
    scores = scores.masked_fill(~seen, -torch.inf)
    if asked.sinks_H is not None:
        scores = torch.cat([scores, sinks_H[None, :, None, None].expand(1, -1, OFFSETS[-1], 1)], dim=-1)
    return scores.softmax(-1)[..., : OFFSETS[-1]] @ value


def with_gradients(out: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    loss = (out * torch.randn(out.shape).to(out.dtype)).sum()
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative; of what is to be zero, as the gradient of scores of a single key is, absolute."""
    size = wanted.detach().norm()
    return float((found - wanted).detach().norm() / (size if size > 1e-9 else 1.0))


def found_and_wanted(asked: Asked, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """In float32, and in float64 from the same numbers."""
    query, key, value, _ = tensors
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found = with_gradients(block_attention((query, key, value), OFFSETS, asked), tensors)
    return found, with_gradients(dense(exact, asked), exact)


def asked(name: str, tensors: list[torch.Tensor]) -> Asked:
    options: dict[str, Any] = dict(ASKED[name])
    return Asked(**options, sinks_H=tensors[3] if "sinks" in name else None)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("queries", [1, 4, 256])
def test_attention_and_gradients_are_those_of_one_dense_softmax(
    name: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "QUERIES", queries)
    tensors = inputs()
    found, wanted = found_and_wanted(asked(name, tensors), tensors)
    assert len(found) == len(wanted) == (5 if "sinks" in name else 4)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.parametrize("name", [name for name in ASKED if name not in ("plain", "window of all")])
def test_an_ability_that_is_dropped_would_be_seen(name: str) -> None:
    """The mutation: plain attention in place of what is asked."""
    tensors = inputs()
    query, key, value, _ = tensors
    plain = block_attention((query, key, value), OFFSETS, Asked())
    assert error(plain, dense(tensors, asked(name, tensors))) > 0.02


def test_no_mask_is_larger_than_a_block_of_queries_by_what_its_windows_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def recorded(queries: int, keys: int, *rest: Any) -> torch.Tensor:
        made.append((queries, keys))
        return mask(queries, keys, *rest)

    mask = blocks._mask
    monkeypatch.setattr(blocks, "_mask", recorded)
    monkeypatch.setattr(blocks, "QUERIES", 16)
    query, key, value = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    block_attention((query, key, value), (0, 200, 300), Asked(window=10))
    assert made
    assert all(queries <= 16 and keys <= 16 + 10 for queries, keys in made)
    # Each key is seen by one query at least: no block is computed that the mask removes.
    assert all(bool(mask(queries, keys, 10, torch.device("cpu")).any(0).all()) for queries, keys in made)


def test_scores_of_one_block_are_all_that_a_soft_cap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed again in the backward pass; kept, they would be S × S numbers."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    monkeypatch.setattr(blocks, "QUERIES", 16)
    query, key, value = (torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block_attention((query, key, value), (0, 256), Asked(softcap=5.0)).sum()
    assert max(kept, default=0) <= 256 * 16 * 8  # one block's scores have as many bytes


def test_what_a_layer_asks_for_has_a_name() -> None:
    assert str(Asked()) == str(Asked(scale=0.3)) == "plain"
    assert str(Asked(window=4, softcap=1.0)) == "a sliding window and a soft cap"
    assert str(Asked(sinks_H=torch.zeros(2), dropout=0.1)) == "sinks and dropout"
