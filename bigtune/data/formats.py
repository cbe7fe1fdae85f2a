"""One row → conversations, in any of the formats that users come with.

The format is recognised row by row, by the row's keys, so that files of different formats mix freely.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bigtune.config import Source
from bigtune.data.conversation import Conversation, Message
from bigtune.data.dialogue import ROLES, check_turns, message_of
from bigtune.data.files import read_chunks, rows_of
from bigtune.data.sources import TURN_KEYS, UNREADABLE, SourceFile, UnreadableFile, resolve_sources
from bigtune.data.values import (
    BadRow,
    check_plain,
    check_text,
    decode_line,
    kind_of,
    list_at,
    objects_at,
    present,
    shown,
    string_at,
    wrong_type,
)
from bigtune.errors import DataError

__all__ = ["BadRow", "ReadCounts", "bad_row_error", "conversations_of", "read_conversations"]

CHUNK_BYTES = 1 << 20
MAX_CHARACTERS = 2**23
"""Of one conversation: to tokenise as many takes about a gibibyte."""

KNOWN = (
    "messages (list of role, content); conversations (list of from, value); instruction, input, "
    "output or response; instruction, instances (list of input, output); question, answer; prompt, completion; text"
)

Row = Mapping[str, Any]
Turns = tuple[Message, ...]


@dataclass
class ReadCounts:
    """What was read: rows in all, and those left out, by reason; a file that cannot be read counts as one."""

    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def read_conversations(
    sources: Sequence[Source], on_bad_row: Literal["error", "skip"], counts: ReadCounts | None = None
) -> Iterator[Conversation]:
    """The conversations of all sources, in their order, read as they are asked for.

    A file that turns out to be unreadable, and is skipped, may have given rows before.

    Raises:
        DataError: there is no such source, or, unless bad rows are skipped, a file cannot be read or a row cannot be
            used.
    """
    counts = counts if counts is not None else ReadCounts()
    files, _ = resolve_sources(sources)
    for file in files:
        try:
            yield from _read_file(file, sources[file.source], on_bad_row, counts)
        except UnreadableFile:
            if on_bad_row == "error":
                raise
            counts.skip(UNREADABLE)


def _read_file(
    file: SourceFile, source: Source, on_bad_row: Literal["error", "skip"], counts: ReadCounts
) -> Iterator[Conversation]:
    for chunk in read_chunks(file, CHUNK_BYTES):
        for row, value in rows_of(chunk):
            counts.rows += 1
            try:
                conversations = conversations_of(value, file.path, row, source)
            except BadRow as bad:
                if on_bad_row == "error":
                    raise bad_row_error(file.path, row, bad) from None
                counts.skip(bad.reason)
            else:
                yield from conversations


def bad_row_error(path: str, row: int, told: object) -> DataError:
    # A chat template's refusal says already what to do about the row.
    mend = "," if "; " in str(told) and not str(told).endswith(")") else "; mend the row,"
    return DataError(f"{path}, row {row}: {told}{mend} or set data.on_bad_row: skip")


def conversations_of(value: Any, file_path: str, row: int, source: Source) -> list[Conversation]:
    """What one row of `rows_of` says: one conversation, or one for each instance of a Self-Instruct row.

    Raises:
        BadRow: the row cannot be used.
    """
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, bytes):
        value = decode_line(value)
    if not isinstance(value, dict):
        raise BadRow("not a JSON object", f" but {kind_of(value)}")
    keys = present(_renamed(value, source.fields) if source.fields else value)
    task, tags, name = _label(keys, "task"), _tags(keys), _label(keys, "id")
    read = _reader_of(keys, value, source)
    if read is _text:
        text = string_at(keys, "text")
        if not text.strip():
            raise BadRow("empty text")
        check_text(text)
        return [_sized(Conversation((), file_path, row, text=text, task=task, tags=tags, id=name, values=keys))]
    tools = _tools(keys)
    made = []
    dialogues = read(keys, source)
    for number, turns in enumerate(dialogues, start=1):
        own = f"{name}/{number}" if name and len(dialogues) > 1 else name
        messages = _with_system(keys, turns)
        check_turns(messages)
        conversation = Conversation(messages, file_path, row, "", tools, task, tags, own, keys)
        made.append(_sized(conversation))
    return made


def _sized(conversation: Conversation) -> Conversation:
    if (size := conversation.characters) > MAX_CHARACTERS:
        raise BadRow("too large", f" ({size:,} characters, at most {MAX_CHARACTERS:,}); cut it up")
    return conversation


def _messages(row: Row, source: Source) -> list[Turns]:
    return [_turns(objects_at(row, "messages"), source, ("role", "content"))]


def _sharegpt(row: Row, source: Source) -> list[Turns]:
    return [_turns(objects_at(row, "conversations"), source, ("from", "value"))]


def _self_instruct(row: Row, source: Source) -> list[Turns]:
    instances = [present(instance) for instance in objects_at(row, "instances")]
    if not instances:
        raise BadRow("empty conversation", " (no instances)")
    return [_pair(_question(row, instance), string_at(instance, "output")) for instance in instances]


def _alpaca(row: Row, source: Source) -> list[Turns]:
    earlier: list[Message] = []
    for exchange in list_at(row, "history", "pairs of strings"):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(said, str) for said in exchange)):
            raise BadRow("wrong type of value", ": 'history' is no list of pairs of strings")
        earlier += _pair(*exchange)
    answer = string_at(row, "output" if "output" in row else "response")
    return [(*earlier, *_pair(_question(row, row), answer))]


def _question_answer(row: Row, source: Source) -> list[Turns]:
    return [_pair(string_at(row, "question"), string_at(row, "answer"))]


def _prompt_completion(row: Row, source: Source) -> list[Turns]:
    """Two texts or two lists of messages. A prompt is what is given: its own assistant turns are not learnt."""
    turns: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            part = _turns(objects_at(row, key), source, ("role", "content"))
        else:
            part = _said(role, string_at(row, key))
        if key == "prompt":
            part = tuple(_given(message) for message in part)
        turns += part
    return [tuple(turns)]


def _text(row: Row, source: Source) -> list[Turns]:
    return []


# The keys that tell a format. `text` comes last: many chat rows carry it too.
_READERS: tuple[tuple[Callable[[Row, Source], list[Turns]], frozenset[str]], ...] = (
    (_messages, frozenset({"messages"})),
    (_sharegpt, frozenset({"conversations"})),
    (_self_instruct, frozenset({"instruction", "instances"})),
    (_alpaca, frozenset({"instruction", "output"})),
    (_alpaca, frozenset({"instruction", "response"})),
    (_question_answer, frozenset({"question", "answer"})),
    (_prompt_completion, frozenset({"prompt", "completion"})),
    (_text, frozenset({"text"})),
)


def _reader_of(row: Row, original: Row, source: Source) -> Callable[[Row, Source], list[Turns]]:
    found = [(read, keys) for read, keys in _READERS if keys <= row.keys()]
    if not found:
        keys = ", ".join(shown(key) for key in list(original)[:20]) or "none"
        lost = [f"{key}: {path}" for key, path in _row_fields(source.fields).items() if key not in row]
        mend = (
            f"fields name what is not there ({', '.join(lost)})" if lost else "name other keys in the source's fields"
        )
        raise BadRow("unknown format", f" (keys: {keys}; known formats: {KNOWN}; {mend})")
    if source.fields:  # a format that the run file speaks of comes before one that the row has keys of by chance
        found.sort(key=lambda one: not (one[1] & source.fields.keys()))
    return found[0][0]


def _row_fields(fields: Mapping[str, str]) -> dict[str, str]:
    return {known: path for known, path in fields.items() if known not in TURN_KEYS}


def _turn_fields(fields: Mapping[str, str]) -> dict[str, str]:
    return {known: path for known, path in fields.items() if known in TURN_KEYS}


def fields_in(value: Any, fields: Mapping[str, str]) -> set[str]:
    """Those of a source's `fields` whose path leads somewhere in a row of `rows_of`, or in one of its turns."""
    try:
        row = decode_line(value) if isinstance(value, bytes) else value
        if not isinstance(row, dict):
            return set()
        found = {known for known, path in _row_fields(fields).items() if _at_path(row, path) is not None}
        own, renamed = _turn_fields(fields), present(_renamed(row, fields))
        for key in ("messages", "conversations", "prompt", "completion") if own else ():
            turns = objects_at(renamed, key) if isinstance(renamed.get(key), list) else []
            found |= {known for turn in turns for known, path in own.items() if _at_path(turn, path) is not None}
        return found
    except BadRow:  # which is told elsewhere
        return set()


def _renamed(row: Row, fields: Mapping[str, str]) -> dict[str, Any]:
    """The row under the known keys. A key that another name was given to is not seen under its own."""
    own = _row_fields(fields)
    taken = {path if path in row else path.split(".")[0] for path in own.values()}
    renamed = {key: value for key, value in row.items() if key not in taken and key not in own}
    return renamed | {known: _at_path(row, path) for known, path in own.items()}


def _at_path(row: Any, path: str) -> Any:
    """What a dotted path leads to, numbers counting from 0 in lists; None where it leads nowhere."""
    if path in row:
        return row[path]
    for part in path.split("."):
        if isinstance(row, dict):
            row = row.get(part)
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _turns(turns: Sequence[dict[str, Any]], source: Source, keys: tuple[str, str]) -> Turns:
    """Messages of role and content or of from and value, whichever a turn has; `keys` are the format's own."""
    roles = ROLES | source.roles
    own = _turn_fields(source.fields)
    other = ("role", "content") if keys == ("from", "value") else ("from", "value")
    made = []
    for turn in turns:
        if own:
            turn = turn | {known: _at_path(turn, path) for known, path in own.items()}
        has_other = turn.get(keys[0]) is None and turn.get(other[0]) is not None
        made.append(message_of(turn, roles, other if has_other else keys))
    return tuple(made)


def _pair(question: str, answer: str) -> Turns:
    return *_said("user", question), *_said("assistant", answer)


def _said(role: str, text: str) -> Turns:
    check_text(text)
    return (Message(role, text),)


def _given(message: Message) -> Message:
    if message.role != "assistant" or message.weight is not None:
        return message
    return Message(message.role, message.content, 0.0, message.extra)


def _question(row: Row, instance: Row) -> str:
    instruction = string_at(row, "instruction")
    context = string_at(instance, "input") if "input" in instance else ""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _with_system(row: Row, turns: Turns) -> Turns:
    """A row's own `system` goes first."""
    system = string_at(row, "system") if "system" in row else ""
    return (*_said("system", system), *turns) if system.strip() else turns


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, or JSON text of the list or of its objects, as tables hold them."""
    tools = [_decoded_tool(tool) if isinstance(tool, str) else tool for tool in list_at(row, "tools")]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong type of value", ": 'tools' is no list of objects")
    check_plain(tools, "tools")
    return tuple(tools)


def _decoded_tool(text: str) -> Any:
    check_text(text)
    return decode_line(text.encode())


def _label(row: Row, key: str) -> str:
    value = row.get(key, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "" if value != value else str(value)  # NaN is how tables of pandas say that there is none
    if not isinstance(value, str):
        raise wrong_type(key, value, "a string")
    check_text(value)
    return value


def _tags(row: Row) -> tuple[str, ...]:
    tags = (
        [row["tags"]]
        if isinstance(row.get("tags"), str) and row["tags"][:1] != "["
        else list_at(row, "tags", "strings")
    )
    if not all(isinstance(tag, str) for tag in tags):
        raise BadRow("wrong type of value", ": 'tags' is no list of strings")
    check_text(*tags)
    return tuple(tags)
