"""What every format becomes: the turns of one conversation, or one plain text."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a source. `messages` is empty for raw text, which is supervised whole.

    `task` is the row's own `task` key, by which evaluation groups its scores; `row` counts from 1.
    """

    messages: tuple[Message, ...]
    path: Path
    row: int
    text: str = ""
    task: str = ""
    tags: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place of the row, for an error message."""
        return f"{self.path}, row {self.row}"
