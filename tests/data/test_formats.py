"""A user brings files as they are found; each row becomes a conversation or one clear complaint."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from bigtune.config import Source
from bigtune.data.conversation import Conversation, Message
from bigtune.data.formats import ReadCounts, read_conversations
from bigtune.errors import DataError

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello")


def read(
    path: Path, on_bad_row: Literal["error", "skip"] = "error", counts: ReadCounts | None = None
) -> list[Conversation]:
    return list(read_conversations([Source(path=path)], on_bad_row, counts))


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": None, "response": "Hello", "text": "the whole prompt again"},
        {"question": "Hi", "answer": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    ],
)
def test_every_chat_format_gives_the_same_turns(tmp_path: Path, row: dict[str, Any]) -> None:
    [conversation] = read(written(tmp_path / "a.jsonl", row))
    assert conversation.messages == (USER, ANSWER)


def test_an_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1, 2", "output": "3"}
    [conversation] = read(written(tmp_path / "a.jsonl", row))
    assert conversation.messages[0].content == "Add\n\n1, 2"


def test_raw_text_task_and_tags_are_kept(tmp_path: Path) -> None:
    [conversation] = read(written(tmp_path / "a.jsonl", {"text": "Once", "task": "story", "tags": ["x", "y"]}))
    assert (conversation.messages, conversation.text) == ((), "Once")
    assert (conversation.task, conversation.tags) == ("story", ("x", "y"))


def test_an_array_and_lines_read_alike_and_count_rows_as_an_editor_does(tmp_path: Path) -> None:
    row = {"question": "Hi", "answer": "Hello"}
    array = tmp_path / "a.json"
    array.write_text("\n  " + json.dumps([row, row], indent=2))
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\n" + json.dumps(row).encode())
    assert [c.messages for c in read(array)] == [c.messages for c in read(lines)] == [(USER, ANSWER)] * 2
    assert [c.row for c in read(array)] == [1, 2]
    assert [c.row for c in read(lines)] == [1, 3]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"question": "Hi", ', "broken JSON"),
        ("[1]", "not a JSON object but a list"),
        ('{"question": "Hi", "answer": 4}', "'answer' is a number, not a string"),
        ('{"question": "Hi", "answer": " \\n"}', "empty answer"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no assistant turn"),
        ('{"messages": [{"role": "tool", "content": "Hi"}]}', "unknown role 'tool'"),
        ('{"messages": "Hi"}', "'messages' is no list of objects"),
        ('{"text": ""}', "empty text"),
        ('{"text": "\\ud800"}', "broken Unicode"),
        ('{"text": "a", "tags": "b"}', "'tags' is no list of strings"),
        ('{"frage": "Hi", "antwort": "Hello"}', "unknown format (keys: 'frage', 'antwort'; known formats: "),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path: Path, line: str, complaint: str) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "fine"}, line, {"text": "fine"})
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, row 2: ") and complaint in message
    assert message.endswith("mend the row, or set data.on_bad_row: skip") and "\n" not in message
    counts = ReadCounts()
    assert [c.row for c in read(path, "skip", counts)] == [1, 3]
    assert counts.rows == 3 and list(counts.skipped.values()) == [1]


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="row 2: not UTF-8"):
        read(path)
    assert len(read(path, "skip")) == 1


def test_a_missing_file_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"^{tmp_path}/gone.jsonl: no such file"):
        read(Path("gone.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def test_a_cut_off_array_is_an_error_even_where_rows_are_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither JSONL nor a whole JSON array"):
        read(written(tmp_path / "a.json", '[{"text": "a"},'), "skip")
