"""Greedy answers in batches, equal to those of one prompt at a time.

B rows, S sequence.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Output:
    """One answer; `tokens` counts what was generated for it, its end included, if it came to one."""

    text: str
    tokens: int
    stopped: bool


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    stop_text: str = "",
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Output]:
    """Continue each prompt greedily up to a stop token, the stop text or `max_new_tokens`.

    The answers come in the prompts' order, without the stop and without special tokens. Sampling settings
    in the model's folder (temperature, repetition penalty, …) are not used: every model is asked alike.
    """
    outputs: dict[int, Output] = {}
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        answers = _continue(model, tokenizer, batch, set(stop_ids), stop_text, max_new_tokens)
        for row, ids in zip(rows, answers, strict=True):
            stopped = len(ids) < max_new_tokens or _Stop(tokenizer, 0, set(stop_ids), stop_text).stops(ids)
            outputs[row] = Output(_text(tokenizer, ids, stop_ids, stop_text), len(ids), stopped)
        if progress:
            progress(len(outputs))
    return [outputs[row] for row in range(len(prompts))]


def _continue(
    model: Any,
    tokenizer: Any,
    batch: Sequence[Sequence[int]],
    stop_ids: set[int],
    stop_text: str,
    max_new_tokens: int,
) -> list[list[int]]:
    """The new tokens of each row, its stop included."""
    from transformers import GenerationConfig

    width = max(map(len, batch))
    padding = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    ids_BS = torch.full((len(batch), width), padding)
    mask_BS = torch.zeros_like(ids_BS)
    for row, ids in enumerate(batch):
        ids_BS[row, width - len(ids) :] = torch.tensor(ids)
        mask_BS[row, width - len(ids) :] = 1
    stop = _Stop(tokenizer, width, stop_ids, stop_text)
    with without_own_settings(model):
        grown_BS = model.generate(
            input_ids=ids_BS.to(model.device),
            attention_mask=mask_BS.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=padding
            ),
            stopping_criteria=[stop],
        )
    new: list[list[int]] = grown_BS[:, width:].tolist()
    # A row that has stopped goes on growing until the last of its batch has.
    return [ids[: stop.lengths.get(row, len(ids))] for row, ids in enumerate(new)]


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """The model's own settings fill what a call leaves open; they are put aside for its length."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Stop:
    """The stopping criterion of one batch. `lengths` holds the new tokens of each row that has stopped."""

    def __init__(self, tokenizer: Any, width: int, stop_ids: set[int], stop_text: str):
        self.lengths: dict[int, int] = {}
        self._tokenizer, self._width = tokenizer, width
        self._stop_ids, self._stop_text = stop_ids, stop_text
        # A token is at least a byte, so a stop text that has just been completed lies within as many tokens.
        self._tail = max(1, len(stop_text.encode()))

    def __call__(self, ids_BS: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        length = ids_BS.shape[1] - self._width
        for row, tail in enumerate(ids_BS[:, self._width :][:, -self._tail :].tolist()):
            if row not in self.lengths and self.stops(tail):
                self.lengths[row] = length
        return torch.tensor([row in self.lengths for row in range(len(ids_BS))], device=ids_BS.device)

    def stops(self, tail: list[int]) -> bool:
        """Whether an answer that ends in these tokens has come to its end with the last."""
        if tail[-1] in self._stop_ids:
            return True
        return bool(self._stop_text) and self._stop_text in self._tokenizer.decode(tail)


def _text(tokenizer: Any, ids: list[int], stop_ids: Collection[int], stop_text: str) -> str:
    if ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return (text.partition(stop_text)[0] if stop_text else text).strip()
