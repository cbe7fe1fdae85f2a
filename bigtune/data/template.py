"""Chat templates: finding one by name or file, compiling it, and rendering turns with it.

Templates run in the sandbox and with the functions that transformers gives them, so a template renders here as
`apply_chat_template` renders it, at a fraction of its overhead.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from bigtune.data.conversation import Message
from bigtune.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"

# For a model that brings no template.
DEFAULT_TEMPLATE = (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")

# Unicode promises that no text uses these characters, so what is written with them is told from any content.
OPENED, CLOSED, SENTINEL = "\ufdd0", "\ufdd1", "\ufdd2\ufdd3\ufdd2"

Turn = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]


class Refusal(Exception):
    """Why a conversation cannot be used, without its place, which whoever reports it adds."""


def template_names() -> list[str]:
    """The templates that bigtune brings."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def template_path(choice: str) -> Path:
    """Where a template is, by a name of bigtune's or the path of a Jinja file."""
    return TEMPLATES / f"{choice}.jinja" if choice in template_names() else Path(choice).expanduser()


def find_template(choice: str, tokens: Collection[str]) -> str:
    """The text of a template, by a name of bigtune's or the path of a Jinja file.

    `tokens` are those that the tokenizer never splits. A template of bigtune's names the ones that it needs in a
    comment: without them its end of turn would be mere text, at which generation never stops.

    Raises:
        ConfigError: there is no such template, it cannot be read, or the tokenizer lacks a token that it needs.
    """
    path = template_path(choice)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).split("\n")[0]
        raise ConfigError(
            f"data.chat_template {choice}: {reason}; give a Jinja file, or one of {', '.join(template_names())}"
        ) from None
    if path.parent != TEMPLATES:
        return text
    needed = re.match(r"\{#- needs: (.*?) -#\}", text)
    missing = [token for token in needed[1].split() if token not in tokens] if needed else []
    if missing:
        raise ConfigError(
            f"data.chat_template {choice}: the tokenizer has no token {' '.join(missing)}; add it to the tokenizer, "
            "or choose another template, as plain"
        )
    return text


class _Brackets(Extension):
    """Writes marks around what a `{% generation %}` block renders.

    transformers' own tracker counts the characters written so far instead, and miscounts inside macros.
    """

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it
    priority = 200  # before transformers' own, which is 100

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Callable[[], str]) -> str:
        return OPENED + caller() + CLOSED


class Template:
    """A compiled template. `variables` are what it sees beside the turns: `bos_token` and the like."""

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        """Compile.

        Raises:
            Refusal: the text is no valid Jinja.
        """
        from transformers.utils import chat_template_utils

        try:
            environment: jinja2.Environment = chat_template_utils._compile_jinja_template(text).environment
            self._compiled = environment.from_string(text)
            self._bracketing: jinja2.Template | None = None
            if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text):
                self._bracketing = environment.overlay(extensions=[_Brackets]).from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise Refusal(f"line {error.lineno}: {_line(error)}") from None
        except RecursionError:
            raise Refusal("it is nested too deeply") from None
        # Jinja chains these, to follow later changes of the environment, and copies the chain for every rendering:
        # most of a short one's time.
        self._compiled.globals = dict(self._compiled.globals)
        self._variables = dict(variables)
        self.takes_tools = "tools" in text

    @property
    def has_blocks(self) -> bool:
        """Whether the template marks with `{% generation %}` what is learnt."""
        return self._bracketing is not None

    def render(self, turns: Sequence[Turn], tools: Tools = (), prompt: bool = False) -> str:
        """The text of the turns; with `prompt`, followed by what asks for an answer.

        Raises:
            Refusal: the template raises.
        """
        return self._run(self._compiled, turns, tools, prompt)

    def render_blocks(self, turns: Sequence[Turn], tools: Tools = ()) -> tuple[str, list[tuple[int, int]]]:
        """The text of the turns, and the character ranges of its `{% generation %}` blocks.

        Raises:
            Refusal: the template raises, or its blocks cannot be traced to where they end up in the text.
        """
        assert self._bracketing is not None
        parts = re.split(f"([{OPENED}{CLOSED}])", self._run(self._bracketing, turns, tools, prompt=False))
        text = "".join(parts[::2])
        opened, at, blocks = -1, 0, []
        for part in parts:
            if part == OPENED:
                opened = at
            elif part == CLOSED:
                blocks.append((opened, at))
            else:
                at += len(part)
        if text != self.render(turns, tools):
            raise Refusal("the chat template changes what its generation blocks have rendered; mend the template")
        return text, blocks

    def _run(self, compiled: jinja2.Template, turns: Sequence[Turn], tools: Tools, prompt: bool) -> str:
        try:
            return compiled.render(
                messages=turns,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # templates raise what they like
            raise Refusal(
                f"the chat template refuses the conversation ({_line(error)}); mend the row or template"
            ) from None


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Messages as templates read them."""
    turns = [{"role": message.role, "content": message.content, **message.extra} for message in messages]
    if any(message.extra for message in messages):
        from transformers.utils import chat_template_utils

        # Newer releases of transformers give a model's reasoning under all the names that templates use for it.
        alias = getattr(chat_template_utils, "_alias_reasoning_fields", list)
        turns = alias(turns)
    return turns


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
