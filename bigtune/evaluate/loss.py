"""Held-out loss: how surprised a model is by the right answers, given their prompts.

B rows, S sequence, T answer tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from bigtune.errors import ModelError
from bigtune.evaluate.prompts import Item

# Padded tokens and logits a batch; 2^26 logits are 256 MiB in float32.
_TOKENS = 8192
_LOGITS = 2**26


@torch.inference_mode()
def answer_losses(model: Any, items: Sequence[Item], *, progress: Callable[[int], None] | None = None) -> list[float]:
    """The sum of -log p over each item's answer tokens, the end of the answer included, in the items' order.

    Rows are batched by length and padded on the right. Logits are computed at the answers' positions alone.

    Raises:
        ModelError: the model has no output head.
    """
    losses = [0.0] * len(items)
    done = 0
    for rows in _batches(items, model.config.get_text_config().vocab_size):
        batch = [items[row] for row in rows]
        sums = _batch_losses(model, batch)
        for row, value in zip(rows, sums, strict=True):
            losses[row] = value
        done += len(rows)
        if progress:
            progress(done)
    return losses


def _batches(items: Sequence[Item], vocabulary: int) -> Iterator[list[int]]:
    """Rows by falling length, so that a batch that is too large for memory fails first."""
    batch: list[int] = []
    logits = 0
    for row in sorted(range(len(items)), key=lambda row: -items[row].length):
        more = len(items[row].answer_ids) * vocabulary
        if batch and (items[batch[0]].length * (len(batch) + 1) > _TOKENS or logits + more > _LOGITS):
            yield batch
            batch, logits = [], 0
        batch.append(row)
        logits += more
    if batch:
        yield batch


def _batch_losses(model: Any, batch: Sequence[Item]) -> list[float]:
    longest = max(item.length for item in batch)
    ids_BS = torch.zeros(len(batch), longest, dtype=torch.long)
    mask_BS = torch.zeros(len(batch), longest, dtype=torch.long)
    predicts_BS = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, item in enumerate(batch):
        start, end = len(item.prompt_ids), item.length
        ids_BS[row, :end] = torch.tensor([*item.prompt_ids, *item.answer_ids])
        mask_BS[row, :end] = 1
        predicts_BS[row, start - 1 : end - 1] = True  # a position predicts the token after it
    targets_T = torch.tensor([token for item in batch for token in item.answer_ids], device=model.device)
    with _head_sees_only(model, predicts_BS.to(model.device)):
        logits_1TV = model(
            input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), use_cache=False
        ).logits
    losses_T = F.cross_entropy(logits_1TV[0].float(), targets_T, reduction="none").double()
    parts = torch.split(losses_T, [len(item.answer_ids) for item in batch])
    return [float(part.sum()) for part in parts]


@contextmanager
def _head_sees_only(model: Any, chosen_BS: torch.Tensor) -> Iterator[None]:
    """Hand the output head the chosen positions alone, as one row: [B, S, D] becomes [1, T, D].

    At the head, and not by calling its weight ourselves: what a model does to its logits afterwards
    (a scale, a soft cap) then still happens.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head over the vocabulary; it cannot be evaluated")
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][chosen_BS][None],))
    try:
        yield
    finally:
        hook.remove()
