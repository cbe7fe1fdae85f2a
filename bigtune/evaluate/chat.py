"""A conversation with a model: what was said so far, and the next answer while it grows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtune.data.chat import ChatFormat
from bigtune.data.conversation import Conversation, Message
from bigtune.errors import DataError
from bigtune.evaluate.generate import without_own_settings
from bigtune.evaluate.load import Loaded, context_of, stop_ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from those that make up `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512


class Chat:
    """Turns of a user and a model. The prompt is the one that training saw, to the token."""

    def __init__(self, loaded: Loaded, sampling: Sampling, system: str = "", seed: int = 0) -> None:
        """Begin with a system prompt, or without.

        Raises:
            ModelError: the tokenizer has no end of text, or a broken template.
        """
        self.format = ChatFormat.of(loaded.tokenizer)
        self._loaded, self._sampling = loaded, sampling
        self._ends = _ends(loaded, self.format)
        self.messages: list[Message] = []
        self.reset(system)
        torch.manual_seed(seed)

    def reset(self, system: str | None = None) -> None:
        """Forget what was said; with another system prompt, if one is given."""
        first = [message for message in self.messages[:1] if message.role == "system"]
        self.messages = first if system is None else [Message("system", system)] * bool(system)

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """The next answer, which is shown piece by piece. Ctrl-C ends it where it is; what was said stays said.

        Raises:
            DataError: the conversation has outgrown the model's context, or the template refuses it.
        """
        turns = [*self.messages, Message("user", text)]
        ids = self.format.prompt_ids(turns)
        context = context_of(self._loaded.model)
        room = (
            self._sampling.max_new_tokens if context is None else min(self._sampling.max_new_tokens, context - len(ids))
        )
        if room < 1:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model's context is {context}; /reset begins anew"
            )
        stream = _Stream(self._loaded.tokenizer, self._ends, show)
        try:
            self._generate(ids, room, stream)
        except KeyboardInterrupt:
            show(" …")
        stream.end()
        self.messages = [*turns, Message("assistant", stream.text)]
        return stream.text

    def save(self, path: Path) -> None:
        """As a row of instruction data."""
        said = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": said}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from None

    @torch.inference_mode()
    def _generate(self, ids: Sequence[int], room: int, stream: "_Stream") -> None:
        from transformers import GenerationConfig

        model, chosen = self._loaded.model, self._sampling
        draws = {"do_sample": True, "temperature": chosen.temperature, "top_p": chosen.top_p, "top_k": 0}
        prompt_BS = torch.tensor([ids], device=model.device)
        with without_own_settings(model):
            model.generate(
                input_ids=prompt_BS,
                attention_mask=torch.ones_like(prompt_BS),
                generation_config=GenerationConfig(
                    max_new_tokens=room, eos_token_id=sorted(self._ends), pad_token_id=min(self._ends),
                    **(draws if chosen.temperature else {"do_sample": False}),
                ),
                streamer=stream,
            )  # fmt: skip


class _Stream:
    """What `generate` tells of each token. Text is shown as far as no later token can change it."""

    def __init__(self, tokenizer: Any, ends: set[int], show: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, ends, show
        self._ids: list[int] = []
        self._prompt_is_over = False
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_over:  # the first call has the prompt
            self._prompt_is_over = True
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._ends]
        text = self._decoded()
        if not text.endswith("\ufffd"):  # the bytes of a character that is not whole yet
            self._advance(text)

    def end(self) -> None:
        self._advance(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text.lstrip()

    def _advance(self, text: str) -> None:
        if text.startswith(self.text) and len(text) > len(self.text):
            self._show(text[len(self.text) :])
        self.text = text


def _ends(loaded: Loaded, form: ChatFormat) -> set[int]:
    """Tokens that end an answer, the template's end of a turn among them."""
    example = Conversation((Message("user", "a"), Message("assistant", "b")), "example", 1)
    [documents] = form.encode([example])
    answers = [] if isinstance(documents, DataError) else [documents[0].input_ids.tolist()]
    return stop_ids(loaded, answers)
