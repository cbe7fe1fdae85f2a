"""Text → words → 64-bit hashes: the language in which documents are compared.

    "The cat,  the CAT!"  ──words──▶  the cat the cat  ──hashes──▶  uint64 [4]  ──ngrams──▶  uint64 [4 - n + 1]

A word is a run of letters, digits and underscores, case-folded and in compatibility form (NFKC), so that punctuation,
spacing, case and full-width letters do not count. Scripts that are written without spaces (Chinese, Japanese kana,
Thai, Lao, Khmer, Burmese) count each character as a word.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from bigtune.data.conversation import Conversation, Message, hash64

UInt64s = npt.NDArray[np.uint64]

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")
# The same for ASCII, at twice the speed: what is in no word becomes a space.
_ASCII_GAPS = {code: " " for code in range(128) if not _WORD.fullmatch(chr(code))}

# Long texts are cut into pieces, so that a row of 100 MB never is millions of Python strings at once. A piece ends
# before a character that neither is in a word nor combines with what stands before it.
_PIECE = 1 << 20
_CUT = re.compile(r"[\s!-/:-@\[-^`{-~\u3000-\u3029]")

# Odd, so that multiplying by it loses nothing modulo 2^64: the golden ratio's digits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _WordHashes(dict[str, int]):
    """Word → BLAKE2b in 64 bits, with the words of late remembered: most words of a text were seen before."""

    MOST, LONGEST = 200_000, 40  # some 30 MiB

    def __missing__(self, word: str) -> int:
        value = hash64(word)
        if len(self) >= self.MOST:
            self.clear()
        if len(word) <= self.LONGEST:
            self[word] = value
        return value


_hashes = _WordHashes()


def word_hashes(text: str) -> UInt64s:
    """A hash of each word of `text`, in order; the same on every machine and in every process."""
    pieces = [np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words)) for words in _words(text)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint64)


def _words(text: str) -> Iterator[list[str]]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _PIECE)
        end = cut.start() if cut else len(text)
        piece = text[start:end]
        if piece.isascii():
            yield piece.lower().translate(_ASCII_GAPS).split()
        else:
            yield _WORD.findall(unicodedata.normalize("NFKC", piece).casefold())
        start = end


def ngrams(words: UInt64s, n: int) -> UInt64s:
    """Hashes of every `n` words in a row: uint64 [W - n + 1], or [0] for fewer words.

    A polynomial of the words' hashes modulo 2^64 (Karp and Rabin 1987, Efficient randomized pattern-matching
    algorithms). The coefficients are random 64-bit numbers themselves, so two different n-grams have the same hash
    with a chance of 2^-64.
    """
    count = max(0, len(words) - n + 1)
    grams = words[:count].copy()
    for i in range(1, n):
        grams *= _MULTIPLIER
        grams += words[i : i + count]
    return grams


class Spoken(NamedTuple):
    """What one message says. A `question` opens its conversation; raw text is question and answer in one."""

    text: str
    question: bool
    answer: bool


def spoken(conversation: Conversation) -> list[Spoken]:
    """The turns that tell a conversation from others: not the system's, whose words whole data sets share."""
    if not conversation.messages:
        return [Spoken(conversation.text, True, True)]
    said = [message for message in conversation.messages if message.role != "system"]
    return [
        Spoken(_said(message), i == 0 and message.role == "user", message.role == "assistant")
        for i, message in enumerate(said)
    ]


def _said(message: Message) -> str:
    """Reasoning, content and tool calls; a call without its id, which is random."""
    if not message.extra:
        return message.content
    parts = [message.extra.get("reasoning_content"), message.content]
    calls = message.extra.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if isinstance(function, Mapping):
            function = {key: value for key, value in function.items() if key not in ("id", "type")}
        parts.append(json.dumps(function, ensure_ascii=False, sort_keys=True, default=str))
    return "\n".join(part for part in parts if isinstance(part, str) and part)


@dataclass(frozen=True, eq=False)
class Words:
    """The words of many turns, end to end.

    `hashes` uint64 [W]; for each turn its number of words `lengths` int64 [T], the conversation it is of `rows`
    int64 [T], and `questions`, `answers` bool [T].
    """

    hashes: UInt64s
    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    questions: npt.NDArray[np.bool_]
    answers: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, conversations: Sequence[Sequence[Spoken]]) -> Self:
        """Count and hash the words of conversations, each given as its turns."""
        hashes = [word_hashes(turn.text) for said in conversations for turn in said]
        return cls(
            np.concatenate(hashes) if hashes else np.empty(0, np.uint64),
            np.array([len(words) for words in hashes], np.int64),
            np.repeat(np.arange(len(conversations)), [len(said) for said in conversations]),
            np.array([turn.question for said in conversations for turn in said], np.bool_),
            np.array([turn.answer for said in conversations for turn in said], np.bool_),
        )

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each turn ends in `hashes`, int64 [T]."""
        return np.cumsum(self.lengths)

    def turn(self, i: int) -> UInt64s:
        end = int(self.ends[i])
        return self.hashes[end - int(self.lengths[i]) : end]

    def rows_of(self, starts: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
        """The conversation of each n-gram that starts at `starts` [K]: int64 [K], -1 for one across two turns."""
        turn = np.searchsorted(self.ends, starts, side="right")
        return np.where(starts + n <= self.ends[turn], self.rows[turn], -1) if len(starts) else starts
