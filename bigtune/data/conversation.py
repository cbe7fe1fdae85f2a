"""What every format becomes: the turns of one conversation, or one plain text."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `weight` is what the row itself says of its part in the loss: 0 for none, None where it says nothing and
    `data.supervise` decides. `extra` is what chat templates know beside: tool_calls, name, tool_call_id,
    reasoning_content.
    """

    role: str  # system, user, assistant or tool
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example of a source. `messages` is empty for raw text, which is supervised whole.

    `task` is the row's own `task` key, by which evaluation groups its scores; `id` its own `id`, if any; `row`
    counts from 1. `values` is the row as it was read, for metrics that look at more than the answer.
    """

    messages: tuple[Message, ...]
    path: str
    row: int
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str = ""
    tags: tuple[str, ...] = ()
    id: str = ""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def where(self) -> str:
        """The place of the row, for an error message."""
        return f"{self.path}, row {self.row}"

    @property
    def characters(self) -> int:
        """Of all that a template may write."""
        said = len(self.text) + len(_plain(self.tools))
        return said + sum(len(message.content) + len(_plain(message.extra)) for message in self.messages)

    @property
    def content_hash(self) -> int:
        """64 bits of what is said, whatever the file, the format and the order of rows."""
        said = [self.text, _plain(self.tools)]
        for message in self.messages:
            said += [message.role, message.content, _plain(message.extra)]
        lengths = ",".join([str(len(part)) for part in said])  # so that no text runs into the next one
        text = f"{lengths};{''.join(said)}"
        return hash64(text)


def hash64(text: str) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True) if value else ""
