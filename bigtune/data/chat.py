"""Conversations → token ids and the spans of them that are supervised, through the model's chat template.

A document's text is rendered and tokenised whole. Supervised are the assistant's words and the token that
ends each of its turns; prompts, headers and what follows an end of turn are not.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.data.conversation import Conversation, Message
from bigtune.errors import DataError, ModelError

# For a model that brings no template. One newline, not two, stands before an answer, so that no common
# pre-tokenizer splits the prompt differently once an answer follows it.
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- else -%}{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")

Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document: `input_ids` int32 [n], `spans` int32 [k, 2], half-open ranges of supervised tokens."""

    input_ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]

    @property
    def supervised(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder. Never asks the network.

    Raises:
        ModelError: the folder or its tokenizer is missing or broken.
    """
    if not path.is_dir():
        raise ModelError(f"{path.absolute()}: no such model folder; correct model.path")
    # Checked here, because transformers makes an empty vocabulary up for some folders without one.
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise ModelError(f"{path}: no tokenizer here (looked for {', '.join(VOCABULARIES)}); copy it in")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(f"{path}: the tokenizer cannot be loaded ({reason}); replace its files") from None


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer and the chat template that it is used with."""

    tokenizer: Any
    template: str
    is_default: bool
    adds_bos: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """The tokenizer's own template, or DEFAULT_TEMPLATE where it has none.

        Raises:
            ModelError: the tokenizer has no end-of-text token, or cannot tell where its tokens lie.
        """
        where = tokenizer.name_or_path or "the tokenizer"
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{where}: the tokenizer has no eos_token; name one in tokenizer_config.json")
        if not tokenizer.is_fast:
            raise ModelError(f"{where}: bigtune needs a fast tokenizer; convert it to tokenizer.json")
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several templates, by name: the unnamed one is called "default"
            template = template.get("default")
        first = tokenizer("x").input_ids[:1]
        adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        return cls(tokenizer, template or DEFAULT_TEMPLATE, not template, adds_bos)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that asks for the next assistant turn, the same as in training.

        Raises:
            DataError: the template refuses the messages.
        """
        return self._render(messages, "a prompt", generation=True)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Documents in the order of the conversations.

        Raises:
            DataError: the template refuses a row, or renders its earlier turns otherwise once more follow.
        """
        if not conversations:
            return []
        drawn = [self._draw(conversation) for conversation in conversations]
        documents = self._tokenise(drawn)
        return [
            _document(ids, spans) if conversation.messages else self._raw(ids)
            for conversation, (ids, spans) in zip(conversations, documents, strict=True)
        ]

    def _raw(self, ids: list[int]) -> Encoded:
        """Raw text: begun as the tokenizer begins text by default, always ended, and supervised whole."""
        ids = [self.tokenizer.bos_token_id] * self.adds_bos + ids + [self.tokenizer.eos_token_id]
        return _document(ids, [(0, len(ids))])

    def _render(self, messages: Sequence[Message], where: str, generation: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # templates raise what they like
            reason = str(error).strip().split("\n")[0][:200]
            raise DataError(
                f"{where}: the chat template refuses the conversation ({reason}); mend the row or template"
            ) from None
        return text

    def _draw(self, conversation: Conversation) -> tuple[str, Spans]:
        """The text of a document and the character ranges of its answers."""
        if not conversation.messages:
            return conversation.text, []
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        messages = conversation.messages[: answers[-1] + 1]  # nothing is learnt from what follows
        text = self._render(messages, conversation.where)
        spans: Spans = []
        for i in answers:
            head = self._render(messages[:i], conversation.where, generation=True)
            turn = text if i == answers[-1] else self._render(messages[: i + 1], conversation.where)
            if not (text.startswith(turn) and turn.startswith(head)):
                raise DataError(
                    f"{conversation.where}: the chat template rewrites earlier turns once later ones follow, "
                    "so that training would differ from use; split the row into one row an answer, or "
                    "change the template"
                )
            spans.append((len(head), _end_of_turn(turn, messages[i].content)))
        return text, spans

    def _tokenise(self, drawn: Sequence[tuple[str, Spans]]) -> list[tuple[list[int], Spans]]:
        """Token ids and token spans of each document; character spans come in."""
        whole = self._ids([text for text, _ in drawn], offsets=True)
        documents: list[tuple[list[int], Spans]] = []
        cut: list[int] = []
        for i, (text, spans) in enumerate(drawn):
            borders = _token_borders(text, spans, whole["offset_mapping"][i])
            if borders is None:
                cut.append(i)
            documents.append((whole["input_ids"][i], borders or []))
        # Few documents, as a rule: their prompts would be split otherwise than at inference.
        pieces = [_pieces(*drawn[i]) for i in cut]
        ids = iter(self._ids([piece for row in pieces for piece in row])["input_ids"] if cut else ())
        for i, row in zip(cut, pieces, strict=True):
            parts = [next(ids) for _ in row]
            edges = np.cumsum([0, *map(len, parts)]).tolist()
            # Pieces alternate: prompt, answer, prompt, answer, …, rest.
            spans = [(edges[k], edges[k + 1]) for k in range(1, 2 * len(drawn[i][1]), 2)]
            documents[i] = [token for part in parts for token in part], spans
        return documents

    def _ids(self, texts: list[str], offsets: bool = False) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,  # long documents are prepare's concern
        )


def _end_of_turn(turn: str, content: str) -> int:
    """Where supervision ends: after the end-of-turn token, before the line break that many templates add.

    A template without such a token ends its turns by white space alone, and that is then supervised.
    """
    body = turn.rstrip()
    return len(turn) if body.endswith(content.rstrip()) else len(body)


def _token_borders(text: str, spans: Spans, offsets: Sequence[tuple[int, int]]) -> Spans | None:
    """Character spans → token spans, or None where the prompt's tokens may not be those of the prompt alone.

    That is so where one token reaches over a border; where white space at a border belongs to no token's
    offsets (some tokenizers trim them); and where a run of white space ends at the answer, since
    pre-tokenizers split such a run by what follows it.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    edges: list[int] = []
    for span in spans:
        for border in span:
            at = int(np.searchsorted(starts, border))
            before = border == 0 or (at > 0 and starts[at - 1] < ends[at - 1] == border)
            after = at == len(starts) or starts[at] == border < ends[at]
            if not (before and after):
                return None
            edges.append(at)
        if text[max(span[0] - 2, 0) : span[0]].isspace() and span[0] >= 2:
            return None
    return list(zip(edges[::2], edges[1::2], strict=True))


def _pieces(text: str, spans: Spans) -> list[str]:
    borders = [0, *(border for span in spans for border in span), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def _document(ids: list[int], spans: Spans) -> Encoded:
    # A document's first token has nothing before it to predict it from.
    kept = [(max(start, 1), end) for start, end in spans if max(start, 1) < end]
    return Encoded(np.array(ids, dtype=np.int32), np.array(kept, dtype=np.int32).reshape(-1, 2))
