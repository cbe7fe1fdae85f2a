"""Attention over packed documents: no token sees another document.

A micro-batch is one flat sequence without padding, its documents one after the other:

    document_offsets = (0, 3, 5, 9)      keys  0 1 2 3 4 5 6 7 8
                                  queries 0-2  ◣
                                          3-4        ◣
                                          5-8            ◣

Each document is one causal call of torch's scaled-dot-product attention, so the masked blocks between
documents are never computed, and no mask is ever built.

Shapes: B batch (always 1), S tokens of the flat sequence, H query heads, K key and value heads, E head size.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bigtune.errors import ModelError

NAME = "bigtune_packed"


def packed_attention(
    module: torch.nn.Module,
    query_BHSE: torch.Tensor,
    key_BKSE: torch.Tensor,
    value_BKSE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_offsets: Sequence[int] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document; called by transformers' layers.

    Args:
        document_offsets: N + 1 rising offsets into S; None for a single document.

    Returns:
        The attended values, [B, S, H, E], and no weights.

    Raises:
        ModelError: the model asks for something that this function would have to drop.
    """
    length = query_BHSE.shape[2]
    offsets = list(document_offsets) if document_offsets is not None else [0, length]
    if offsets[-1] != length:
        raise ValueError(f"document offsets end at {offsets[-1]}, the sequence at {length}")
    longest = max(end - start for start, end in pairwise(offsets))
    _refuse_what_would_be_dropped(longest, options)
    grouped = query_BHSE.shape[1] != key_BKSE.shape[1]
    parts = [
        scaled_dot_product_attention(
            query_BHSE[:, :, start:end],
            key_BKSE[:, :, start:end],
            value_BKSE[:, :, start:end],
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=grouped,
        )
        for start, end in pairwise(offsets)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _refuse_what_would_be_dropped(longest: int, options: dict[str, Any]) -> None:
    window = options.get("sliding_window")
    refused = {
        f"a sliding window of {window} tokens, shorter than a document of {longest}": window is not None
        and window < longest,
        "a soft cap on attention scores": options.get("softcap") is not None,
        "attention sinks": options.get("s_aux") is not None,
        "bidirectional attention": options.get("is_causal") is False,
    }
    for what, asked in refused.items():
        if asked:
            raise ModelError(f"the model uses {what}, which packed attention does not support yet")


AttentionInterface.register(NAME, packed_attention)
