"""Token ids → what each token says, and whether it is learnt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers.decoders import DecodeStream

from bigtune.data.chat import load_tokenizer
from bigtune.data.document import Document


@dataclass(frozen=True, slots=True)
class Token:
    """What one token says, or what several say together that are parts of one character.

    `weight` is its part in the loss, 0 where it is not supervised.
    """

    text: str
    count: int
    weight: float
    special: bool

    @property
    def supervised(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens that are not shown."""

    count: int
    supervised: int


class Reader:
    """Reads documents with the tokenizer that made them, which is loaded, for seconds, when there is one to read."""

    def __init__(self, model_path: Path) -> None:
        self._model_path = model_path

    @cached_property
    def _tokenizer(self) -> tuple[Any, frozenset[int]]:
        """What decodes, and the ids of special tokens."""
        tokenizer = load_tokenizer(self._model_path)
        special = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        return tokenizer.backend_tokenizer, special

    def read(self, document: Document) -> tuple[Token, ...]:
        """The tokens of a document; joined, their texts are its text.

        Raises:
            ModelError: the tokenizer cannot be loaded.
        """
        return tuple(self._tokens(document))

    def _tokens(self, document: Document) -> Iterator[Token]:
        core, specials = self._tokenizer
        weights = learnt_weights(document)
        ids = document.input_ids.tolist()
        stream, start = DecodeStream(skip_special_tokens=False), 0
        for at, id in enumerate(ids):
            special = id in specials
            if special and start < at:  # a character that was cut off
                yield self._token(self._decode(ids[start:at]), weights[start:at])
                stream, start = DecodeStream(skip_special_tokens=False), at
            text = stream.step(core, id)
            if text is None and special:  # a special token is whole, whatever it says
                text = self._decode([id])
                stream = DecodeStream(skip_special_tokens=False)
            if text is not None:
                yield self._token(text, weights[start : at + 1], special)
                start = at + 1
        if start < len(ids):
            yield self._token(self._decode(ids[start:]), weights[start:])

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer[0].decode(ids, skip_special_tokens=False))

    def _token(self, text: str, weights: npt.NDArray[np.float32], special: bool = False) -> Token:
        return Token(text, len(weights), float(weights.max()), special)


def learnt_weights(document: Document) -> npt.NDArray[np.float32]:
    """The part of each token in the loss, float32 [n]; that of a first token is 0, since nothing predicts it."""
    weights = np.zeros(len(document), dtype=np.float32)
    for (start, end), weight in zip(document.spans.tolist(), document.weights.tolist(), strict=True):
        weights[max(start, 1) : end] = weight
    return weights


def shorten(tokens: Sequence[Token], most: int) -> tuple[Sequence[Token], Gap | None, Sequence[Token]]:
    """The beginning and the end of a document, of at most about so many tokens, and what is between them."""
    if len(tokens) <= most:
        return tokens, None, ()
    head = -(-most * 2 // 3)
    tail = len(tokens) - (most - head)
    between = tokens[head:tail]
    gap = Gap(sum(token.count for token in between), sum(token.count for token in between if token.supervised))
    return tokens[:head], gap, tokens[tail:]
