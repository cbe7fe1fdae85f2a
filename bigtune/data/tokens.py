"""Text → token ids, such that borders between characters are borders between tokens.

A model is asked with a prompt that was tokenised alone. So where an answer begins inside a text, the tokens before
it must be those of the prompt alone; and what spells a special token in someone's words must not become that token.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from bigtune.data.template import Refusal

# Special tokens spelled in a row are written as characters of plane 16 while a template renders, and the real ones
# as characters of plane 15 while the text is tokenised; neither has a meaning to anyone. Both keep the lengths.
_SPELLED, _REAL, _LAST = 0x100000, 0xF0000, 0x10FFFF
_PRIVATE = re.compile(f"[{chr(_REAL)}-{chr(_LAST)}]")
_RUN = re.compile(f"([{chr(_SPELLED)}-{chr(_LAST)}])\\1*")

# Put before a piece of text that is tokenised apart, for tokenizers that begin every text with a space.
_ANCHORS = ("\n", ".", "a")
_LOOK_BACK_TOKENS = 32

BATCH_CHARACTERS = 2**20
"""Text that is tokenised at once: what the tokenizer keeps of it on the way takes a hundred times as many bytes."""

CACHED_WORDS = 2**17
"""Words whose tokens a byte-pair model remembers, some 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text to tokenise. `cuts` are increasing positions of characters at which a token must begin; `prompts` are
    those of them that end a prompt; `hidden` tells that `hide` was applied to what it was made of."""

    text: str
    cuts: Sequence[int] = ()
    prompts: Sequence[int] = ()
    hidden: bool = False


# Token ids int32 [n], and for each cut the token that begins there.
Tokenised = tuple[npt.NDArray[np.int32], list[int]]


class Tokens:
    """A tokenizer at work. Adds no special tokens of its own, never pads and never truncates."""

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._core = _bare(Tokenizer.from_str(tokenizer_json))
        added = self._core.get_added_tokens_decoder()
        self._ids = {token.content: id for id, token in added.items() if token.special}
        self._dividing = frozenset(self._ids.values())
        self._specials = list(self._ids)
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._number = {token: at for at, token in enumerate(self._specials)}
        self._tails: dict[str, list[int]] = {}

    @property
    def special(self) -> re.Pattern[str]:
        """Matches a special token."""
        return self._special

    def spelled(self, value: Any) -> bool:
        """Whether a special token is spelled in a text, or anywhere in lists and mappings of texts."""
        return self._special.search("\0".join(_texts(value))) is not None

    def hide(self, value: Any) -> Any:
        """The same with characters of no meaning in place of spelled special tokens.

        Raises:
            Refusal: the text uses such characters itself.
        """
        if isinstance(value, str):
            if _PRIVATE.search(value):
                raise Refusal("it spells a special token and has characters of Unicode's planes 15 or 16; remove them")
            return self._special.sub(lambda found: self._stand_in(found[0], _SPELLED), value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, texts: Sequence[Text]) -> list[Tokenised | Refusal]:
        """Token ids and borders of each text, or why it cannot be had."""
        results: list[Tokenised | Refusal] = [Refusal("")] * len(texts)
        for hidden in (False, True):
            chosen = [i for i, text in enumerate(texts) if text.hidden == hidden]
            made = self._encode([texts[i] for i in chosen], hidden) if chosen else []
            for i, result in zip(chosen, made, strict=True):
                results[i] = result
        return results

    def _encode(self, texts: Sequence[Text], hidden: bool) -> list[Tokenised | Refusal]:
        results: list[Tokenised | Refusal] = []
        begin = size = 0
        for at, text in enumerate(texts, start=1):
            size += len(text.text)
            if size >= BATCH_CHARACTERS or at == len(texts):
                results += self._encode_batch(texts[begin:at], hidden)
                begin, size = at, 0
        return results

    def _encode_batch(self, texts: Sequence[Text], hidden: bool) -> list[Tokenised | Refusal]:
        core = self._renamed[0] if hidden else self._core
        written = [self._written(text.text) for text in texts] if hidden else [text.text for text in texts]
        results: list[Tokenised | Refusal] = []
        for text, line, encoding in zip(texts, written, _batch(core, written), strict=True):
            if encoding is None:
                results.append(Refusal("it has characters that are no valid Unicode (lone surrogates); remove them"))
                continue
            ids = encoding.ids
            edges = self._edges(core, encoding, ids, line, text)
            if edges is None:
                pieces = self._pieces(core, line, text.cuts)
                if pieces is None:
                    results.append(Refusal("the tokenizer joins prompt and answer into one token; change the row"))
                    continue
                ids, edges = pieces
            if hidden and not self._faithful(line, ids):
                results.append(Refusal("text that spells a special token cannot be kept as text; remove it"))
                continue
            results.append((np.array(ids, dtype=np.int32), edges))
        return results

    def _edges(self, core: Tokenizer, encoding: Encoding, ids: list[int], line: str, text: Text) -> list[int] | None:
        """The token at each cut; None where the tokens before one may not be those of the text before it alone.

        That is so where a token reaches over a cut; where white space at a cut belongs to no token (some tokenizers
        trim it); and where a run of white space ends a prompt, since pre-tokenizers split it by what follows.
        """
        edges = []
        for cut in text.cuts:
            at = _border(encoding, len(ids), cut, len(line))
            if at is None:
                return None
            doubtful = cut >= 2 and line[cut - 2 : cut].isspace() and cut in text.prompts
            if doubtful and not self._settled(core, encoding, ids, line, cut, at):
                return None
            edges.append(at)
        return edges

    def _settled(self, core: Tokenizer, encoding: Encoding, ids: list[int], line: str, cut: int, at: int) -> bool:
        """Whether the prompt before `cut` ends in the same tokens when it stands alone.

        Special tokens divide a text, so what follows the last of them decides.
        """
        for begin in range(at - 1, max(at - _LOOK_BACK_TOKENS, 0) - 1, -1):
            if ids[begin] in self._dividing:
                break
        else:
            return False
        tail = line[_span(encoding, begin)[0] : cut]
        alone = self._tails.get(tail)
        if alone is None:
            if len(self._tails) > 1000:
                self._tails.clear()
            alone = self._tails[tail] = core.encode(tail, add_special_tokens=False).ids
        return alone == ids[begin:at]

    def _pieces(self, core: Tokenizer, line: str, cuts: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """Token ids and edges of the text tokenised piece by piece, as generation after a prompt makes them."""
        borders = [0, *cuts, len(line)]
        pieces = [line[begin:end] for begin, end in itertools.pairwise(borders)]
        ids: list[int] = core.encode(pieces[0], add_special_tokens=False).ids
        edges = []
        for piece in pieces[1:]:
            edges.append(len(ids))
            more = self._continued(core, piece)
            if more is None:
                return None
            ids += more
        return ids, edges

    def _continued(self, core: Tokenizer, piece: str) -> list[int] | None:
        """Token ids of text that does not begin a document."""
        if not self._begins_with_space:
            ids: list[int] = core.encode(piece, add_special_tokens=False).ids
            return ids
        for anchor in _ANCHORS:
            encoding = core.encode(anchor + piece, add_special_tokens=False)
            at = _border(encoding, len(encoding.ids), 1, len(piece) + 1)
            if at is not None:
                return list(encoding.ids[at:])
        return None

    @cached_property
    def _begins_with_space(self) -> bool:
        """Whether a text's first word is tokenised as if a space stood before it."""
        alone, after = (self._core.encode(text, add_special_tokens=False).ids for text in ("x", "\nx"))
        return bool(alone != after[-len(alone) :])

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, frozenset[int]]:
        """The tokenizer with other names for its special tokens, so that text which spells them stays text.

        With it the ids of special tokens, but for the one that stands for what the vocabulary lacks.
        """
        text, unknown = _rename(self._json, {token: self._stand_in(token, _REAL) for token in self._specials})
        return _bare(Tokenizer.from_str(text)), self._dividing - {self._ids.get(unknown, -1)}

    def _written(self, text: str) -> str:
        """What to tokenise: special tokens of the template under their other names, spelled ones as they are."""
        named = self._special.sub(lambda found: self._stand_in(found[0], _REAL), text)
        return _RUN.sub(self._spell, named)

    def _spell(self, found: re.Match[str]) -> str:
        token = self._specials[ord(found[1]) - _SPELLED]
        # A template may cut a content anywhere; the length is kept all the same.
        return (token * (len(found[0]) // len(token) + 1))[: len(found[0])]

    def _stand_in(self, token: str, plane: int) -> str:
        return chr(plane + self._number[token]) * len(token)

    def _faithful(self, line: str, ids: Sequence[int]) -> bool:
        """Whether the special tokens in `ids` are as many as the template wrote."""
        counted = self._renamed[1]
        lengths = {
            chr(_REAL + at): len(token) for at, token in enumerate(self._specials) if self._ids[token] in counted
        }
        written = sum(line.count(letter) // length for letter, length in lengths.items())
        return written == sum(id in counted for id in ids)


def _texts(value: Any) -> list[str]:
    """All that is said in a text, or anywhere in lists and mappings of texts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if not isinstance(value, list | tuple):
        return []
    texts = []
    for item in value:
        if type(item) is str:
            texts.append(item)
        else:
            texts += _texts(item)
    return texts


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = None  # some trim white space from the characters of a token
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is not None:  # 10,000 by default; real text has more words than that, and a sixth of the time is saved
        resize(CACHED_WORDS)
    return tokenizer


def _rename(tokenizer_json: str, names: Mapping[str, str]) -> tuple[str, str]:
    """The tokenizer with other names for some tokens, the ids unchanged; and its unknown token by its old name."""
    tree = json.loads(tokenizer_json)
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tree["model"]
    unknown = model.get("unk_token") or ""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    else:  # Unigram: pairs of token and score
        unknown = "" if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(unknown, unknown)
    tree["post_processor"] = None  # names tokens too
    return json.dumps(tree), unknown


def _batch(core: Tokenizer, lines: list[str]) -> Sequence[Encoding | None]:
    try:
        return core.encode_batch(lines, add_special_tokens=False)
    except Exception:  # one text spoils the batch
        return [_single(core, line) for line in lines]


def _single(core: Tokenizer, line: str) -> Encoding | None:
    try:
        return core.encode(line, add_special_tokens=False)
    except Exception:  # the library raises what it likes for what is no Unicode text
        return None


def _border(encoding: Encoding, count: int, cut: int, length: int) -> int | None:
    """The token that begins at character `cut` with another ending there; None where there is no such border."""
    if cut == 0:
        return 0
    at: int | None = count if cut == length else encoding.char_to_token(cut)
    if at is None or at == 0:
        return None
    if at < count and _span(encoding, at)[0] != cut:
        return None
    begin, end = _span(encoding, at - 1)
    return at if begin < end == cut else None


def _span(encoding: Encoding, at: int) -> tuple[int, int]:
    """The characters of a token; none of a text's, where it has none."""
    return encoding.token_to_chars(at) or (-1, -1)
