"""Turns of a conversation → the documents to learn from: rendered text and the ranges of it that are supervised.

A chat template is asked, never second-guessed. What an answer is, is what the template adds to the prompt that
would ask for it:

    prompt(i) = render(turns before i, and what asks for an answer)
    turn(i)   = render(turns up to i)  =  prompt(i) + answer(i) + the end of the turn …

Some templates write an earlier turn otherwise once a later one follows: they drop its reasoning, as Qwen 3 does.
Then one text cannot teach both answers as they are asked for, and a conversation becomes several documents: the
last answer with all those before it that read the same in it, then the last of the others likewise. So each answer
is learnt once, in the very context that it is given in.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bigtune.data.conversation import Message
from bigtune.data.template import SENTINEL, Refusal, Template, Tools, Turn

Supervise = Literal["all", "last"] | tuple[str, ...]

MAX_RENDERED = 2**28
"""Characters that the renderings of one conversation may have together, a turn counted as some: seconds of work."""
TURN_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Drawn:
    """A document before it is tokenised: `spans` are the supervised ranges of characters, increasing and disjoint,
    with a weight each, and `prompts` the positions at which a prompt ends and its answer begins."""

    text: str
    spans: Sequence[tuple[int, int]] = ()
    weights: Sequence[float] = ()
    prompts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Answer:
    """An assistant's turn: its context and itself, `text`; without what only ends a conversation, `core`."""

    text: str
    core: str
    prompt: int  # length of the prompt
    spans: Sequence[tuple[int, int]]


def supervised_turns(messages: Sequence[Message], supervise: Supervise) -> dict[int, float]:
    """Weight of each turn that is learnt, by its number. A message's own weight comes before `supervise`."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    chosen = set(answers[-1:] if supervise == "last" else answers)
    if isinstance(supervise, tuple):
        chosen = {i for i, message in enumerate(messages) if message.role in supervise}
    weights = {}
    for i, message in enumerate(messages):
        weight = float(i in chosen) if message.weight is None else message.weight
        if weight:
            weights[i] = weight
    return weights


class Drawing:
    """A template with what it needs to know about itself. `special` matches a special token of the tokenizer."""

    def __init__(self, template: Template, special: re.Pattern[str]) -> None:
        self.template = template
        self._special = special
        self._ending = re.compile(rf"(?:{special.pattern})\Z")

    def draw(self, turns: Sequence[Turn], tools: Tools, weights: dict[int, float]) -> list[Drawn]:
        """The documents of one conversation, in the order of their last supervised turns.

        Nothing is learnt from turns after the last supervised one, so they are left out.

        Raises:
            Refusal: the template raises, or what is supervised cannot be told exactly.
        """
        if tools and not self.template.takes_tools:
            raise Refusal("it has tools, and the chat template has no place for them; choose another chat_template")
        if not weights:
            return [Drawn(self.template.render(turns, tools))]
        size = sum(len(turn["content"]) + TURN_CHARACTERS for turn in turns)
        if len(weights) * size > MAX_RENDERED:  # each answer is rendered with all that comes before it
            raise Refusal(f"it is too large ({len(weights):,} answers in {size:,} characters); cut it up")
        answers = {i: self._answer(turns, i, tools) for i in weights if turns[i]["role"] == "assistant"}
        pending = sorted(weights)
        documents: list[Drawn] = []
        while pending:
            last = pending[-1]
            text = answers[last].text if last in answers else self.template.render(turns[: last + 1], tools)
            taught = [i for i in pending if i not in answers or i == last or text.startswith(answers[i].core)]
            spans: list[tuple[tuple[int, int], float]] = []
            for i in taught:
                found = answers[i].spans if i in answers else [self._said(turns[: last + 1], i, tools, text)]
                spans += [(span, weights[i]) for span in found]
            spans.sort()  # some templates put a system turn after the questions
            prompts = [answers[i].prompt for i in taught if i in answers]
            documents.append(Drawn(text, [span for span, _ in spans], [weight for _, weight in spans], prompts))
            pending = [i for i in pending if i not in taught]
        return documents[::-1]

    def _answer(self, turns: Sequence[Turn], i: int, tools: Tools) -> _Answer:
        prompt = self._prompt(turns[:i], i, tools)
        if self.template.has_blocks:
            text, blocks = self.template.render_blocks(turns[: i + 1], tools)
        else:
            text, blocks = self.template.render(turns[: i + 1], tools), []
        core = text.removesuffix(self.closing)
        if not core.startswith(prompt):
            raise Refusal(
                f"the chat template writes the answer of turn {i + 1} otherwise than its generation prompt "
                f"({prompt[-30:]!r}) begins it, so that training would differ from use; choose another "
                "chat_template, or give answers as the template wants them (with reasoning, say)"
            )
        lost = _left_out(turns[i], core[len(prompt) :])
        if lost:
            raise Refusal(f"the chat template leaves out {lost} of turn {i + 1}; choose another chat_template")
        if self.template.has_blocks:
            # A block may hold the turn's header too; one of an earlier turn lies within the prompt.
            spans = self._ended(core, [block for block in blocks if block[1] > len(prompt)])
        else:
            spans = [(len(prompt), self._end_of_turn(core, len(prompt), turns[i]["content"]))]
        return _Answer(text, core, len(prompt), spans)

    def _prompt(self, turns: Sequence[Turn], i: int, tools: Tools) -> str:
        try:
            return self.template.render(turns, tools, prompt=True)
        except Refusal:
            if turns:
                raise
            raise Refusal("the chat template cannot ask for an answer before the first question") from None

    def _ended(self, core: str, blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Blocks of one turn, the last with the special token that ends the turn where just that was left out."""
        spans = list(blocks)
        if spans:
            begin, end = spans[-1]
            token = self._special.match(core, end)
            if token and not core[token.end() :].strip():
                spans[-1] = (begin, token.end())
        return spans

    def _end_of_turn(self, core: str, prompt: int, content: str) -> int:
        """Where supervision ends: after the end-of-turn token, before the line break that many templates add.

        A template without such a token ends its turns by white space alone, and that is then supervised.
        """
        body, said = core.rstrip(), content.strip()
        if self._ending.search(body, prompt):  # first, since an answer may end as the token does: in ">", say
            return len(body)
        unmarked = body.endswith(said) if said else len(body) <= prompt
        return len(core) if unmarked else len(body)

    def _said(self, turns: Sequence[Turn], i: int, tools: Tools, text: str) -> tuple[int, int]:
        """Where the content of a turn lies in `text`, and the token that ends the turn, if one follows directly.

        The template is given another content in its place: what stays the same around it is not content.
        """
        other = [*turns[:i], {**turns[i], "content": SENTINEL}, *turns[i + 1 :]]
        before, found, after = self.template.render(other, tools).partition(SENTINEL)
        rest = len(text) - len(after)
        exact = found and SENTINEL not in after and text.startswith(before) and text.endswith(after)
        if not exact or rest < len(before):
            raise Refusal(
                f"the chat template does not tell where turn {i + 1} ({turns[i]['role']}) begins and ends; supervise "
                "assistant turns alone, or choose another chat_template"
            )
        token = self._special.match(text, rest)
        return len(before), token.end() if token else rest

    @cached_property
    def closing(self) -> str:
        """What the template writes after the end of the last turn only, as Phi 3's does with `<|endoftext|>`.

        It ends conversations, not turns, and generation never gets as far: it is not learnt, and that it is gone
        when more turns follow does not make an earlier answer another one.
        """
        said = [SENTINEL[:2] + letter for letter in "abc"]
        turns = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said, strict=True)
        ]
        try:
            whole, more = self.template.render(turns[:2]), self.template.render(turns, prompt=True)
        except Refusal:
            return ""
        same = next((at for at, (a, b) in enumerate(zip(whole, more, strict=False)) if a != b), len(whole))
        for token in self._special.finditer(whole):
            if token.start() < same < token.end():
                same = token.start()
        answered = whole.find(said[1]) + len(said[1])
        # Without a token that ends the turn, what follows is not the conversation's end but the turn's.
        return whole[same:] if said[1] in whole[:same] and self._special.search(whole, answered, same) else ""


def _left_out(turn: Turn, answer: str) -> str:
    """What the template has not written of an answer, white space aside; empty where it is whole."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or () if isinstance(call, Mapping)]
    named = [call.get("name") for call in calls if isinstance(call, Mapping)]
    meant = [("the content", turn["content"]), ("the reasoning", turn.get("reasoning_content"))]
    for what, text in [*meant, *(("a tool call", name) for name in named)]:
        if isinstance(text, str) and text.strip() not in answer and _solid(text) not in _solid(answer):
            return what
    return ""


def _solid(text: str) -> str:
    return "".join(text.split())
