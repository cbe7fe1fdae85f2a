"""Attention over packed documents: no token sees another document.

A micro-batch is one flat sequence without padding, its documents one after the other:

    offsets = (0, 3, 5, 9)               keys  0 1 2 3 4 5 6 7 8
                                  queries 0-2  ◣
                                          3-4        ◣
                                          5-8            ◣

What a layer asks for beside, a window, a soft cap or sinks, decides the kernel. On CUDA that is flash-attn where it is
installed, else torch's `varlen_attn`, each only where a small trial on this device gives what `blocks.py` gives; else
one causal call of torch's scaled-dot-product attention a document, or `blocks.py`, which can do all. None of them
computes a block between documents, and what a layer asks for is never dropped. `kernels_used` tells what came of it.

Where documents end is told by `documents(offsets)` around the forward and backward pass, not as an argument of the
model: some families' layers do not hand arguments on to their attention, and would mix documents in silence.

Shapes: B batch (always 1), S tokens of the flat sequence, H query heads, K key and value heads, E head size,
N documents.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bigtune.errors import ModelError
from bigtune.model.blocks import QKV, Asked, block_attention

NAME = "bigtune_packed"

kernels_used: dict[str, str] = {}
"""What layers asked for, in words → the kernel that does it, since the process began."""

_at_work: "tuple[Offsets, int] | None" = None  # where documents end in the micro-batch, and the longest one

UNKNOWN = {
    "position_bias": "a bias by position",
    "indices": "a choice of keys",
    "block_indices": "a choice of blocks of keys",
    "sinks": "sinks of another form",
}
"""Options of transformers' layers that no kernel here knows."""


GROUPED = "enable_gqa"
"""How torch's kernels are told that several query heads share a key."""
Offsets = tuple[int, ...]
Kernel = Callable[[QKV, Offsets, Asked], torch.Tensor]


@contextmanager
def documents(offsets: Sequence[int]) -> Iterator[None]:
    """Where the documents of the sequence begin and end: N + 1 numbers rising from 0 to S.

    It holds for the backward pass too, in which checkpointed layers attend again.
    """
    global _at_work
    before, _at_work = _at_work, (tuple(offsets), max(end - start for start, end in pairwise(offsets)))
    try:
        yield
    finally:
        _at_work = before


def packed_attention(
    module: torch.nn.Module,
    query_BHSE: torch.Tensor,
    key_BKSE: torch.Tensor,
    value_BKSE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of the `documents`; called by transformers' layers.

    Returns:
        The attended values, [B, S, H, E], and no weights.

    Raises:
        ModelError: the layer asks for something that no kernel does.
    """
    length = query_BHSE.shape[2]
    if _at_work is None or _at_work[0][-1] != length:
        raise ValueError(f"a sequence of {length} tokens, and documents at {_at_work and _at_work[0]}")
    offsets, longest = _at_work
    asked = _asked(longest, scaling, dropout, attention_mask, options)
    qkv = (query_BHSE, key_BKSE, value_BKSE)
    name, kernel = _kernel(qkv, asked)
    kernels_used[str(asked)] = name
    return kernel(qkv, offsets, asked).transpose(1, 2).contiguous(), None


def describe_kernels() -> str:
    """What layers asked for and which kernels do it, in words."""
    return ", ".join(f"{asked} by {kernel}" for asked, kernel in kernels_used.items()) or "the model's own"


def _asked(
    longest: int, scale: float | None, dropout: float, mask: torch.Tensor | None, options: dict[str, Any]
) -> Asked:
    refused = [what for option, what in UNKNOWN.items() if options.get(option) is not None]
    if options.get("is_causal") is False:
        refused.append("attention to later tokens")
    if mask is not None:
        refused.append("a mask of its own")
    if refused:
        raise ModelError(f"the model's attention asks for {', '.join(refused)}, which packed attention cannot do")
    window = options.get("sliding_window")
    reached = window is not None and window < longest
    return Asked(scale, dropout, window if reached else None, options.get("softcap"), options.get("s_aux"))


def _kernel(qkv: QKV, asked: Asked) -> tuple[str, Kernel]:
    """The first kernel that does what is asked, and its name."""
    query, key, value = qkv
    if query.is_cuda and asked.sinks_H is None:
        wanted = (asked.dropout > 0, asked.window is not None, asked.softcap is not None)
        kernels: dict[str, Kernel] = {"flash-attn": _flash_attn}
        if not asked.dropout and asked.softcap is None:
            kernels["varlen_attn"] = _varlen_attn
        for name, kernel in kernels.items():
            if _able(kernel, query.shape[1] // key.shape[1], query.shape[3], value.shape[3], query.dtype, *wanted):
                return name, kernel
    plain = asked.window is None and asked.softcap is None and asked.sinks_H is None
    return ("sdpa", _by_document) if plain else ("blocks", block_attention)


@lru_cache(maxsize=64)
def _able(
    kernel: Kernel, group: int, size: int, value_size: int, dtype: torch.dtype, dropout: bool, window: bool, cap: bool
) -> bool:
    """Whether a CUDA kernel gives, forward and backward, what `block_attention` gives, on two small documents.

    Dropout, whose draws differ by kernel, is tried with nothing to drop out.
    """
    random = torch.Generator(device="cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 48, width, device="cuda", dtype=dtype, generator=random, requires_grad=True)
        for heads, width in ((2 * group, size), (2, size), (2, value_size))
    )
    asked = Asked(dropout=1e-9 if dropout else 0.0, window=7 if window else None, softcap=2.0 if cap else None)
    found: list[list[torch.Tensor]] = []
    try:
        for one in (kernel, block_attention):
            out = one((query, key, value), (0, 17, 48), asked)
            found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
    except Exception:  # not installed, or it refuses: each library in its own way
        return False
    return all(float((a - b).float().norm() / b.float().norm()) < 0.02 for a, b in zip(*found, strict=True))


def _flash_attn(qkv: QKV, offsets: Offsets, asked: Asked) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    query, key, value = (tensor[0].transpose(0, 1) for tensor in qkv)
    cuts_N, longest = _cuts(offsets, query.device)
    attended: torch.Tensor = flash_attn_varlen_func(
        query, key, value, cuts_N, cuts_N, longest, longest,
        dropout_p=asked.dropout,
        softmax_scale=asked.scale,
        causal=True,
        window_size=(-1, -1) if asked.window is None else (asked.window - 1, 0),
        softcap=asked.softcap or 0.0,
    )  # fmt: skip
    return attended.transpose(0, 1)[None]


def _varlen_attn(qkv: QKV, offsets: Offsets, asked: Asked) -> torch.Tensor:
    from torch.nn.attention import varlen

    options: dict[str, Any] = {"scale": asked.scale}
    options["window_size"] = (-1 if asked.window is None else asked.window - 1, 0)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in qkv)
    group = query.shape[1] // key.shape[1]
    if group > 1 and GROUPED in inspect.signature(varlen.varlen_attn).parameters:
        options[GROUPED] = True
    elif group > 1:  # torch 2.11 knows no grouped queries
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    cuts_N, longest = _cuts(offsets, query.device)
    attended = cast(torch.Tensor, varlen.varlen_attn(query, key, value, cuts_N, cuts_N, longest, longest, **options))
    return attended.transpose(0, 1)[None]


@lru_cache(maxsize=4)
def _cuts(offsets: Offsets, device: torch.device) -> tuple[torch.Tensor, int]:
    """Offsets on the device, int32 [N + 1], and the longest document: the same in every layer."""
    return torch.tensor(offsets, dtype=torch.int32, device=device), max(b - a for a, b in pairwise(offsets))


def _by_document(qkv: QKV, offsets: Offsets, asked: Asked) -> torch.Tensor:
    grouped = qkv[0].shape[1] != qkv[1].shape[1]
    lengths = [end - start for start, end in pairwise(offsets)]
    # Split, not sliced: in the backward pass a slice fills a whole tensor with zeros, for each document anew.
    parts = [
        scaled_dot_product_attention(
            query, key, value, None, asked.dropout, is_causal=True, scale=asked.scale, enable_gqa=grouped
        )
        for query, key, value in zip(*(tensor.split(lengths, dim=2) for tensor in qkv), strict=True)
    ]
    return torch.cat(parts, dim=2)


AttentionInterface.register(NAME, packed_attention)
