"""Raw files → conversations: JSONL or one JSON array, in any of the formats that users come with.

The format is recognised row by row, by the row's keys, so that files of different formats mix freely.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bigtune.config import Source
from bigtune.data.conversation import Conversation, Message
from bigtune.errors import DataError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

FORMATS = (
    "messages (list of role, content); conversations (list of from, value); instruction, input, "
    "output or response; question, answer; prompt, completion; text"
)
_BOM = b"\xef\xbb\xbf"


@dataclass
class ReadCounts:
    """What was read: rows in all, and those left out, by reason."""

    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class _BadRow(Exception):
    """One row cannot be used. `reason` is what it is counted under, `detail` what its own message adds."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_conversations(
    sources: Sequence[Source], on_bad_row: Literal["error", "skip"], counts: ReadCounts | None = None
) -> Iterator[Conversation]:
    """The conversations of all sources, in their order. JSONL is streamed; an array is read at once.

    Raises:
        DataError: a file cannot be read, or, unless bad rows are skipped, a row cannot be used.
    """
    counts = counts if counts is not None else ReadCounts()
    for source in sources:
        for number, raw in _raw_rows(source.path):
            counts.rows += 1
            try:
                conversation = _conversation(raw, source.path, number)
            except _BadRow as bad:
                if on_bad_row == "error":
                    raise DataError(
                        f"{source.path}, row {number}: {bad.reason}{bad.detail}; "
                        "mend the row, or set data.on_bad_row: skip"
                    ) from None
                counts.skip(bad.reason)
            else:
                yield conversation


def unreadable(path: Path, error: OSError) -> DataError:
    """The one line for a source that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path.absolute()}: no such file; correct the path under sources")
    return DataError(f"{path.absolute()}: cannot be read ({error.strerror}); name a JSONL or JSON file")


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Row numbers and rows: decoded JSON values, or the undecoded bytes of a line."""
    try:
        with path.open("rb") as file:
            # The first non-blank character decides: an array, or one object a line.
            first = next((line for line in file if line.removeprefix(_BOM).strip()), b"")
            if not first.removeprefix(_BOM).lstrip().startswith(b"["):
                file.seek(0)
                for number, line in enumerate(file, start=1):
                    line = line.removeprefix(_BOM) if number == 1 else line
                    if line.strip():
                        yield number, line
                return
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: neither JSONL nor a whole JSON array ({error}); mend the file") from None
    yield from enumerate(rows, start=1)


def _conversation(raw: Any, path: Path, number: int) -> Conversation:
    row = _decode(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise _BadRow("not a JSON object", f" but {_kind(row)}")
    task = row.get("task")
    tags = row.get("tags")
    if task is not None and not isinstance(task, str):
        raise _BadRow("wrong type of value", f": 'task' is {_kind(task)}, not a string")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise _BadRow("wrong type of value", ": 'tags' is no list of strings")
    messages = _messages(row)
    text = "" if messages else _string(row, "text")
    if not messages and not text.strip():
        raise _BadRow("empty text")
    _check_unicode(text, *(message.content for message in messages))
    return Conversation(messages, path, number, text=text, task=task or "", tags=tuple(tags or ()))


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of a row, checked; empty for raw text. `text` comes last: many chat rows carry it too."""
    if "messages" in row:
        messages = _turns(row, "messages", "role", "content")
    elif "conversations" in row:
        messages = _turns(row, "conversations", "from", "value")
    elif "instruction" in row and ("output" in row or "response" in row):
        messages = _alpaca(row)
    elif "question" in row and "answer" in row:
        messages = _pair(_string(row, "question"), _string(row, "answer"))
    elif "prompt" in row and "completion" in row:
        messages = _pair(_string(row, "prompt"), _string(row, "completion"))
    elif "text" in row:
        return ()
    else:
        keys = ", ".join(map(repr, row)) or "none"
        raise _BadRow("unknown format", f" (keys: {keys}; known formats: {FORMATS})")
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise _BadRow("no assistant turn")
    if not all(answer.strip() for answer in answers):
        raise _BadRow("empty answer")
    return messages


def _alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    extra = _string(row, "input") if row.get("input") is not None else ""
    instruction = _string(row, "instruction")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return _pair(question, _string(row, "output" if "output" in row else "response"))


def _pair(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def _turns(row: Mapping[str, Any], key: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    turns = row[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRow("wrong type of value", f": '{key}' is no list of objects")
    messages = []
    for turn in turns:
        role = _string(turn, role_key)
        if role not in ROLES:
            raise _BadRow("unknown role", f" '{role}' (known: {', '.join(ROLES)})")
        messages.append(Message(ROLES[role], _string(turn, content_key)))
    return tuple(messages)


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _BadRow("wrong type of value", f": '{key}' is {_kind(value)}, not a string")
    return value


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRow("not UTF-8", f" (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise _BadRow("broken JSON", f" ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise _BadRow("broken JSON", f" ({error})") from None


def _check_unicode(*texts: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        for text in texts:
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow("broken Unicode", " (a lone surrogate, \\ud800 to \\udfff)") from None


def _kind(value: Any) -> str:
    """The JSON name of a value's type; a missing key reads as null."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "missing or null",
    }
    return names.get(type(value), "a number")
