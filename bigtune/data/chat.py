"""Conversations → token ids and the spans of them that are supervised, through a chat template.

    Conversation ──turns──▶ text, ranges of characters ──tokens──▶ token ids, spans of tokens

Supervised are, as a rule, the assistant's words and the token that ends each of its turns; prompts, headers and
what follows an end of turn are not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bigtune.data.conversation import Conversation, Message
from bigtune.data.document import Document
from bigtune.data.template import DEFAULT_TEMPLATE, Refusal, Template, Tools, find_template, turns_of
from bigtune.data.tokens import Text, Tokenised, Tokens
from bigtune.data.turns import Drawing, Drawn, Supervise, supervised_turns
from bigtune.errors import ConfigError, DataError, ModelError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


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
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, **_known_config(path)
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(f"{path}: the tokenizer cannot be loaded ({reason}); replace its files") from None


def check_vocabulary(tokenizer: Any, path: Path) -> None:
    """Refuse a tokenizer whose own vocabulary is larger than the embeddings of the model in its folder.

    Added tokens are not counted: Gemma 3 has some that its text models lack, and no text gives them. Whether documents
    have any is seen when they are made.

    Raises:
        ModelError: names both numbers.
    """
    try:
        rows = json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError):
        return
    size = tokenizer.vocab_size
    if size > rows:
        raise ModelError(
            f"{path}: its tokenizer has {size:,} tokens, but the model {rows:,} embeddings; "
            "bring the tokenizer that belongs to the model"
        )


def _known_config(path: Path) -> dict[str, Any]:
    """A plain config for AutoTokenizer, which then need not import the model's own and half of torch with it.

    It asks a config for the type of model alone where tokenizer_config.json names the class of tokenizer.
    """
    from transformers import PreTrainedConfig

    try:
        named = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        tree = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not named.get("tokenizer_class") or "auto_map" in named:
            return {}
        kind = {name: tree[name] for name in ("tokenizer_class", "model_name", "_name_or_path") if name in tree}
        return {"config": type("_Known", (PreTrainedConfig,), {"model_type": tree["model_type"]})(**kind)}
    except Exception:  # whatever is wrong there, AutoTokenizer says it
        return {}


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become documents: a tokenizer, a chat template, and what of it is supervised.

    Plain data, to be sent to other processes once each; what works is built in every process when first used.
    """

    tokenizer_json: str = field(repr=False)
    template: str = field(repr=False)
    name: str  # where the template is from: model, a name of bigtune's, or a file
    tool_template: str | None = field(repr=False)  # the model's own for rows with tools, if it has one
    variables: tuple[tuple[str, str], ...]  # special tokens as templates know them
    bos_id: int | None  # None where the tokenizer begins no text with it
    eos_id: int
    supervise: Supervise
    special_tokens: Literal["text", "parse"]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        chat_template: str | None = None,
        supervise: Supervise = "all",
        special_tokens: Literal["text", "parse"] = "text",
    ) -> "ChatFormat":
        """The format of a transformers tokenizer.

        `chat_template` names a template of bigtune's or a Jinja file; without it, the tokenizer's own is used, or
        `plain` where it has none. `supervise` takes all assistant turns, the last one, or turns of these roles.
        With `special_tokens="text"`, what spells a special token in a row stays text; added tokens that are not
        special, as `<think>` often is, are tokens anywhere.

        Raises:
            ConfigError: there is no such template, or it is no valid Jinja.
            ModelError: the tokenizer has no end-of-text token, cannot tell where its tokens lie, or has a broken
                template.
        """
        where = tokenizer.name_or_path or "the tokenizer"
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{where}: the tokenizer has no eos_token; name one in tokenizer_config.json")
        if not tokenizer.is_fast:
            raise ModelError(f"{where}: bigtune needs a fast tokenizer; convert it to tokenizer.json")
        own, tool_template = _own_templates(tokenizer.chat_template)
        if chat_template is not None:
            added = [token.content for token in tokenizer.added_tokens_decoder.values()]
            name, template, tool_template = chat_template, find_template(chat_template, added), None
        else:
            name, template = ("model", own) if own else ("plain", DEFAULT_TEMPLATE)
        begun = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        made = cls(
            tokenizer_json=tokenizer.backend_tokenizer.to_str(),
            template=template,
            name=name,
            tool_template=tool_template,
            variables=tuple(tokenizer.special_tokens_map.items()),
            bos_id=tokenizer.bos_token_id if begun else None,
            eos_id=tokenizer.eos_token_id,
            supervise=supervise,
            special_tokens=special_tokens,
        )
        try:
            made._drawings  # noqa: B018 - compiled now, so that a broken template is told of before any row
        except Refusal as reason:
            if chat_template is not None:
                raise ConfigError(f"data.chat_template {name}, {reason}; mend the template") from None
            raise ModelError(f"{where}: its chat template, {reason}; mend it, or name a data.chat_template") from None
        return made

    @property
    def identity(self) -> str:
        """All that decides the token ids, as text; the template's name is not of it."""
        return json.dumps(self.__getstate__() | {"name": ""}, sort_keys=True)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The text that asks for the next assistant turn, the same as in training.

        Raises:
            DataError: the template refuses the messages.
        """
        try:
            return self._drawing(tools).template.render(turns_of(messages), tools, prompt=True)
        except Refusal as reason:
            raise DataError(f"a prompt: {reason}") from None

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids of the prompt, the same as in training.

        Raises:
            DataError: the template refuses the messages.
        """
        turns = turns_of(messages)
        try:
            turns, tools, hidden = self._shielded(turns, tools)
            text = Text(self._drawing(tools).template.render(turns, tools, prompt=True), hidden=hidden)
            [made] = self._tokens.encode([text])
            if isinstance(made, Refusal):
                raise made
        except Refusal as reason:
            raise DataError(f"a prompt: {reason}") from None
        ids: list[int] = made[0].tolist()
        return ids

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Document] | DataError]:
        """The documents of each conversation, by turn, or why there are none; in the order of the conversations.

        A conversation is one document, but for templates that write earlier turns otherwise once more follow; see
        `bigtune.data.turns`. Raw text is begun as the tokenizer begins text by default, ended, and supervised whole.
        """
        drawn = [self._draw(conversation) for conversation in conversations]
        texts = [
            Text(document.text, _cuts(document), document.prompts, hidden)
            for row in drawn
            if not isinstance(row, Refusal)
            for document, hidden in row
        ]
        made = iter(self._tokens.encode(texts))
        return [
            DataError(f"{conversation.where}: {row}")
            if isinstance(row, Refusal)
            else self._finished(conversation, [(document, next(made)) for document, _ in row])
            for conversation, row in zip(conversations, drawn, strict=True)
        ]

    def _draw(self, conversation: Conversation) -> list[tuple[Drawn, bool]] | Refusal:
        """Documents, and whether spelled special tokens were hidden in them."""
        try:
            if not conversation.messages:
                [turn], _, hidden = self._shielded([{"content": conversation.text}], ())
                return [(Drawn(turn["content"]), hidden)]
            weights = supervised_turns(conversation.messages, self.supervise)
            turns, tools, hidden = self._shielded(turns_of(conversation.messages), conversation.tools)
            return [(document, hidden) for document in self._drawing(tools).draw(turns, tools, weights)]
        except Refusal as reason:
            return reason

    def _shielded(self, turns: list[dict[str, Any]], tools: Tools) -> tuple[list[dict[str, Any]], Tools, bool]:
        """Turns and tools with spelled special tokens hidden, and whether there were any."""
        if self.special_tokens == "parse" or not (self._tokens.spelled(turns) or self._tokens.spelled(tools)):
            return turns, tools, False
        return self._tokens.hide(turns), self._tokens.hide(tools), True

    def _finished(
        self, conversation: Conversation, made: Sequence[tuple[Drawn, Tokenised | Refusal]]
    ) -> list[Document] | DataError:
        documents = []
        for drawn, tokenised in made:
            if isinstance(tokenised, Refusal):
                return DataError(f"{conversation.where}: {tokenised}")
            ids, edges = tokenised
            if conversation.messages:
                at = dict(zip(_cuts(drawn), edges, strict=True))
                documents.append(_document(ids, [(at[a], at[b]) for a, b in drawn.spans], drawn.weights))
            else:
                begun = [] if self.bos_id is None else [self.bos_id]
                ids = np.concatenate([np.array(begun, np.int32), ids, np.array([self.eos_id], np.int32)])
                documents.append(_document(ids, [(0, len(ids))], [1.0]))
        return documents

    def _drawing(self, tools: Tools) -> Drawing:
        return self._drawings[bool(tools)]

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens(self.tokenizer_json)

    @cached_property
    def _drawings(self) -> tuple[Drawing, Drawing]:
        """How rows without and with tools are drawn."""
        special, variables = self._tokens.special, dict(self.variables)
        plain = Drawing(Template(self.template, variables), special)
        if self.tool_template is None:
            return plain, plain
        return plain, Drawing(Template(self.tool_template, variables), special)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _own_templates(own: str | Mapping[str, str] | None) -> tuple[str | None, str | None]:
    """A tokenizer's template, and its other one for rows with tools, if it has several by name."""
    if isinstance(own, Mapping):
        return own.get("default"), own.get("tool_use")
    return own, None


def _cuts(drawn: Drawn) -> list[int]:
    """Where tokens must begin: at the ends of prompts, and on both sides of what is supervised."""
    return sorted({*drawn.prompts, *(border for span in drawn.spans for border in span)})


def _document(ids: npt.NDArray[np.int32], spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> Document:
    # A document's first token has nothing before it to predict it from.
    kept = [(max(start, 1), end, weight) for (start, end), weight in zip(spans, weights, strict=True)]
    kept = [(start, end, weight) for start, end, weight in kept if start < end]
    return Document(
        ids,
        np.array([span[:2] for span in kept], dtype=np.int32).reshape(-1, 2),
        np.array([span[2] for span in kept], dtype=np.float32),
    )
