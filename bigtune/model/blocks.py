"""Attention by blocks of queries: what torch's own kernels do not offer, without a block that the mask removes.

A block of queries sees the keys from the first one that any of its windows reaches to its own last:

        keys  ◣           window 4, blocks of 3 queries: each line of blocks is one product of
              ◥◣◣         3 × (3 + 3), and no mask is larger than that
    queries     ◥◣◣

Scores with a soft cap or sinks are computed here, and computed again in the backward pass, so that one block's scores
is all that there ever is; others go through torch's scaled-dot-product attention.

Shapes: S tokens, H query heads, K key and value heads, G query heads that share one, E head size, Q queries of a
block, N keys that it sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

QUERIES = 256
"""Queries of a block."""


QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [1, H, S, E], keys [1, K, S, E] and values [1, K, S, E]."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a layer asks of its attention beside causality within documents."""

    scale: float | None = None
    """Of the scores; 1 / √E if None."""
    dropout: float = 0.0
    window: int | None = None
    """Keys that a query sees, itself and those before it; all of its document's if None."""
    softcap: float | None = None
    """Scores become softcap × tanh(score / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118)."""
    sinks_H: torch.Tensor | None = None
    """A score of each head that takes part in the softmax and has no value, as in GPT-OSS
    (https://arxiv.org/abs/2508.10925)."""

    def __str__(self) -> str:
        named = [
            (self.window, "a sliding window"),
            (self.softcap, "a soft cap"),
            (self.sinks_H, "sinks"),
            (self.dropout or None, "dropout"),
        ]
        return " and ".join(name for value, name in named if value is not None) or "plain"


def block_attention(qkv: QKV, offsets: Sequence[int], asked: Asked) -> torch.Tensor:
    """Causal attention within each document, [1, H, S, E].

    `offsets` tell where documents begin and end: N + 1 numbers rising from 0 to S.
    """
    query_BHSE, key_BKSE, value_BKSE = qkv
    scale = query_BHSE.shape[-1] ** -0.5 if asked.scale is None else asked.scale
    parts = []
    for start, end in pairwise(offsets):
        for first in range(start, end, QUERIES):
            last = min(first + QUERIES, end)
            seen = start if asked.window is None else max(start, first - asked.window + 1)
            query, key, value = query_BHSE[:, :, first:last], key_BKSE[:, :, seen:last], value_BKSE[:, :, seen:last]
            mask_QN = _mask(last - first, last - seen, asked.window, query.device)
            if asked.softcap is None and asked.sinks_H is None:
                grouped = query.shape[1] != key.shape[1]
                part = scaled_dot_product_attention(
                    query, key, value, mask_QN, asked.dropout, scale=scale, enable_gqa=grouped
                )
            else:
                part = checkpoint(_attended, query, key, value, mask_QN, scale, asked, use_reentrant=False)
            parts.append(part)
    return torch.cat(parts, dim=2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, the last query being at the last key."""
    ago_QN = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (ago_QN >= 0) if window is None else (ago_QN >= 0) & (ago_QN < window)


def _attended(
    query_BHQE: torch.Tensor,
    key_BKNE: torch.Tensor,
    value_BKNE: torch.Tensor,
    mask_QN: torch.Tensor,
    scale: float,
    asked: Asked,
) -> torch.Tensor:
    heads, key_heads = query_BHQE.shape[1], key_BKNE.shape[1]
    query_BKGQE = query_BHQE.unflatten(1, (key_heads, heads // key_heads))
    scores = (query_BKGQE @ key_BKNE.unsqueeze(2).transpose(-1, -2)).float() * scale
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    scores = scores.masked_fill(~mask_QN, -torch.inf)
    if asked.sinks_H is not None:
        sinks = asked.sinks_H.float().view(1, key_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : mask_QN.shape[1]].to(value_BKNE.dtype)
    return (drop(weights, asked.dropout) @ value_BKNE.unsqueeze(2)).flatten(1, 2)
