"""A user brings files as they are found; each row becomes a conversation or one clear complaint."""

import gzip
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from bigtune.config import Source
from bigtune.data.conversation import Conversation, Message
from bigtune.data.formats import BadRow, ReadCounts, bad_row_error, conversations_of, read_conversations
from bigtune.errors import DataError
from tests.data import containers

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
    # As tables hold them.
    for row, task, tags in (
        ({"task": 3, "tags": "x"}, "3", ("x",)),
        ({"task": float("nan"), "tags": '["x"]'}, "", ("x",)),
    ):
        [conversation] = conversations({"text": "Once", **row})
        assert (conversation.task, conversation.tags) == (task, tags)


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
        ('{"messages": [{"role": "narrator", "content": "Hi"}]}', "unknown role 'narrator'"),
        ('{"messages": "Hi"}', "'messages' is no list of objects"),
        ('{"text": ""}', "empty text"),
        ('{"text": "\\ud800"}', "broken Unicode"),
        ('{"text": "a", "tags": [1]}', "'tags' is no list of strings"),
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


def test_a_file_that_cannot_be_read_is_named_or_counted_and_the_others_are_read(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}')[:-12])
    written(tmp_path / "c.jsonl", {"text": "last"})
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: damaged or cut off"):
        read(tmp_path / "*.jsonl*")
    counts = ReadCounts()
    assert [c.text for c in read(tmp_path / "*.jsonl*", "skip", counts)] == ["first", "last"]
    assert counts.rows == 2 and counts.skipped == {"unreadable file": 1}


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
    with pytest.raises(DataError, match="no file to read here"):
        read(tmp_path)


def test_a_cut_off_array_is_an_unreadable_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"text": "a"},')
    with pytest.raises(DataError, match="neither JSONL nor a whole JSON array"):
        read(path)
    counts = ReadCounts()
    assert read(path, "skip", counts) == [] and counts.skipped == {"unreadable file": 1}


def conversations(row: Any, **source: Any) -> list[Conversation]:
    return conversations_of(row, "a.jsonl", 1, Source(path=Path("a.jsonl"), **source))


def turns(row: Any, **source: Any) -> list[tuple[str, str]]:
    [conversation] = conversations(row, **source)
    return [(message.role, message.content) for message in conversation.messages]


def refused(row: Any, **source: Any) -> str:
    with pytest.raises(BadRow) as caught:
        conversations(row, **source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


def said(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye!")]
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"town": "Ulm", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}
CALLED = [
    Message("user", "Weather?"),
    Message("assistant", "", None, {"tool_calls": [CALL]}),
    Message("tool", "rain"),
    Message("assistant", "It rains."),
]
ARGUMENTS = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]

# The same conversation in every format that can hold it.
SAME = {
    "messages": said(*CHAT),
    "conversations": {"conversations": [{"from": role, "value": text} for role, text in CHAT]},
    "row's own system": {"conversations": said(*CHAT[1:])["messages"], "system": "Be brief."},
    "history": {
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "instruction": "Bye",
        "input": "",
        "output": "Bye!",
    },
    "lists": {"prompt": said(*CHAT[:4])["messages"], "completion": said(*CHAT[4:])["messages"]},
    "list and text": {"prompt": said(*CHAT[:4])["messages"], "completion": "Bye!"},
}
SINGLE = {
    "messages": said(*CHAT[1:3]),
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "chatbot", "value": "Hello"}]},
    "instruction": {"instruction": "Hi", "input": "", "output": "Hello"},
    "response": {"instruction": "Hi", "response": "Hello"},
    "instances": {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]},
    "question": {"question": "Hi", "answer": "Hello"},
    "prompt": {"prompt": "Hi", "completion": "Hello"},
}


@pytest.mark.parametrize("form", SAME)
def test_a_chat_of_many_turns_is_the_same_in_every_format(form: str) -> None:
    assert turns(SAME[form]) == CHAT


@pytest.mark.parametrize("name", containers.CONTAINERS)
@pytest.mark.parametrize("rows", [SAME, SINGLE], ids=["many turns", "one turn"])
def test_every_format_reads_the_same_from_every_container(tmp_path: Path, name: str, rows: dict[str, Any]) -> None:
    seen = set()
    for form, row in rows.items():
        if form == "list and text" and name.startswith(("rows.csv", "rows.tsv")):
            continue  # a cell is text, so that this prompt is one
        if form == "lists" and name.startswith(("rows.csv", "rows.tsv")):
            continue
        [conversation] = read(containers.write(tmp_path, name, [row]))
        seen.add((conversation.content_hash, conversation.row))
    assert len(seen) == 1
    other = containers.write(tmp_path, name, [{"question": "Hi", "answer": "Hello."}])
    assert read(other)[0].content_hash not in {content for content, _ in seen}


def test_formats_mix_in_one_file_of_columns_whose_other_keys_are_null(tmp_path: Path) -> None:
    rows = [SINGLE["messages"], SINGLE["question"], {"text": "Once"}, SINGLE["conversations"]]
    path = containers.write(tmp_path, "rows.parquet", rows)
    assert [len(conversation.messages) for conversation in read(path)] == [2, 2, 0, 2]


def test_a_self_instruct_row_gives_one_conversation_an_instance(tmp_path: Path) -> None:
    instances = [{"input": "2", "output": "even"}, {"input": "3", "output": "odd"}]
    row = {"id": "seed_1", "instruction": "Even or odd?", "instances": instances, "is_classification": True}
    counts = ReadCounts()
    read_ = read(written(tmp_path / "a.jsonl", row), counts=counts)
    assert [[m.content for m in c.messages] for c in read_] == [
        ["Even or odd?\n\n2", "even"],
        ["Even or odd?\n\n3", "odd"],
    ]
    assert [c.id for c in read_] == ["seed_1/1", "seed_1/2"] and counts.rows == 1
    assert refused({**row, "instances": []}) == "empty conversation (no instances)"
    assert "'output' is a number" in refused({**row, "instances": [*instances, {"output": 3}]})


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": CALL["function"]}]},
                {"role": "tool", "content": [{"type": "text", "text": "ra"}, {"type": "text", "text": "in"}]},
                {"role": "assistant", "content": "It rains."},
            ],
            "tools": [TOOL],
        },
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "function_call": {"name": "sky", "arguments": ARGUMENTS}},
                {"role": "function", "content": "rain"},
                {"role": "assistant", "content": "It rains."},
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains."},
            ],
            "tools": [json.dumps(TOOL)],
        },
    ],
)  # fmt: skip
def test_tool_calls_and_their_results_are_the_same_however_they_are_written(row: dict[str, Any]) -> None:
    [conversation] = conversations(row)
    assert list(conversation.messages) == CALLED
    assert conversation.tools == (TOOL,)


def test_tool_calls_survive_columns_which_fill_the_keys_of_other_rows_with_null(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "sea", "arguments": {"depth": 3}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "x"},
                {"role": "assistant", "content": "It rains.", "reasoning_content": "Hm."},
            ]
        }
        for call in (CALL, other)
    ]
    path = containers.write(tmp_path, "rows.parquet", rows)
    calls = [conversation.messages[1].extra["tool_calls"] for conversation in read(path)]
    assert calls == [[CALL], [other]]
    assert dict(read(path)[0].messages[2].extra) == {"tool_call_id": "1", "name": "x"}
    assert dict(read(path)[0].messages[3].extra) == {"reasoning_content": "Hm."}


def test_a_null_that_a_tool_call_spells_in_json_is_kept() -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": '{"x": null}'}}
    row = said(("user", "Do"), ("assistant", ""))
    row["messages"][1]["tool_calls"] = [call]
    [conversation] = conversations(row)
    assert conversation.messages[1].extra["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": None}}, "id": "c1"}
    ]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"function": {"arguments": "{}"}}, "broken tool call (no function with a name)"),
        ({"function": {"name": "f", "arguments": "{"}}, "broken tool call (not JSON)"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "broken tool call (the arguments of 'f' are no object)"),
        ({"name": "f", "arguments": {"x": float("nan")}}, "'tool_calls' holds nan"),
        ({"name": "f", "arguments": '{"x":' * 70 + "1" + "}" * 70}, "nested too deeply"),
        ({"name": "f", "arguments": {"x": "\ud800"}}, "broken Unicode"),
        ({"name": "f", "arguments": {"x": b"1"}}, "'tool_calls' holds binary data"),
        ("f", "'tool_calls' is no list of objects"),
    ],
)
def test_a_broken_tool_call_is_a_bad_row(call: Any, complaint: str) -> None:
    row = said(("user", "Do"), ("assistant", ""))
    row["messages"][1]["tool_calls"] = [call]
    assert complaint in refused(row)


def test_content_may_be_a_list_of_texts_but_of_nothing_else() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert turns(said(("user", "Hi"), ("assistant", parts)))[1] == ("assistant", "Hello")  # type: ignore[arg-type]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    complaint = refused(said(("user", image), ("assistant", "A cat")))  # type: ignore[arg-type]
    assert complaint == "content that is not text (a part of type 'image_url')"


@pytest.mark.parametrize(
    ("marks", "weight"),
    [
        ({}, None),
        ({"train": True}, 1.0),
        ({"train": False}, 0.0),
        ({"weight": 0}, 0.0),
        ({"weight": 0.25, "train": None}, 0.25),
        ({"weight": 2, "train": True}, 2.0),
        ({"weight": 2, "train": False}, 0.0),
    ],
)
def test_a_turn_may_say_what_part_it_has_in_the_loss(marks: dict[str, Any], weight: float | None) -> None:
    for user, key, value in (("user", "role", "content"), ("human", "from", "value")):
        rows = [{key: user, value: "Hi"}, {key: "assistant", value: "Hello", **marks}]
        [conversation] = conversations({"messages" if key == "role" else "conversations": rows})
        assert [message.weight for message in conversation.messages] == [None, weight]


@pytest.mark.parametrize(
    "marks",
    [{"train": "no"}, {"train": 0}]
    + [{"weight": weight} for weight in ("1", True, -1, float("nan"), float("inf"), 10**400, 1e39, 1e-50)],
)
def test_a_mark_of_the_wrong_type_or_range_is_a_bad_row(marks: dict[str, Any]) -> None:
    row = said(("user", "Hi"), ("assistant", "Hello"))
    row["messages"][1] |= marks
    assert refused(row).startswith("wrong type of value")


def test_what_a_prompt_holds_is_given_and_not_learnt() -> None:
    [conversation] = conversations(SAME["lists"])
    assert [message.weight for message in conversation.messages] == [None, None, 0.0, None, None]
    marked = {"prompt": [*said(*CHAT[1:2])["messages"], {"role": "assistant", "content": "Hello", "train": True}]}
    [conversation] = conversations({**marked, "completion": said(*CHAT[3:])["messages"]})
    assert [message.weight for message in conversation.messages] == [None, 1.0, None, None]


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        ("", "empty conversation"),
        ("au", "assistant turn first"),
        ("sa", "assistant turn first after the system turn"),
        ("usa", "roles out of order (turn 2: system after user)"),
        ("ssua", "roles out of order (turn 2: system after system)"),
        ("uua", "roles out of order (turn 2: user after user)"),
        ("uaa", "roles out of order (turn 3: assistant after assistant)"),
        ("uta", "roles out of order (turn 2: tool after user)"),
        ("tua", "roles out of order (turn 1: tool first)"),
        ("su", "no assistant turn"),
    ],
)
def test_turns_out_of_order_are_a_bad_row(roles: str, complaint: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert refused(said(*((names[letter], "x") for letter in roles))) == complaint


@pytest.mark.parametrize("roles", ["ua", "sua", "uau", "uata", "uatta", "suatua"])
def test_turns_in_order_are_read(roles: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert "".join(role[0] for role, _ in turns(said(*((names[letter], "x") for letter in roles)))) == roles


def test_a_row_without_an_answer_is_read_where_it_marks_something_else_to_learn() -> None:
    row = said(("user", "Hi"))
    assert refused(row) == "no assistant turn"
    row["messages"][0]["weight"] = 0
    assert refused(row) == "no assistant turn"
    row["messages"][0]["train"], row["messages"][0]["weight"] = True, 1
    assert conversations(row)[0].messages[0].weight == 1


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"task": {"text": "Hi"}, "gold": "Hello"}, {"instruction": "task.text", "output": "gold"}),
        ({"a.b": "Hi", "answer": "Hello"}, {"question": "a.b"}),
        ({"q": "Hi", "answers": {"text": ["Hello", "Hey"]}}, {"question": "q", "answer": "answers.text.0"}),
        ({"dialog": [{"who": "user", "what": {"en": "Hi"}}, {"who": "bot", "what": {"en": "Hello"}}]},
         {"messages": "dialog", "role": "who", "content": "what.en"}),
        ({"messages": "an old key", "prompt": "Hi", "best": "Hello"}, {"completion": "best"}),
        ({"answer": "Hi", "question": "Hello"}, {"question": "answer", "answer": "question"}),
    ],
)  # fmt: skip
def test_fields_name_the_keys_of_any_row(row: dict[str, Any], fields: dict[str, str]) -> None:
    assert turns(row, fields=fields) == [("user", "Hi"), ("assistant", "Hello")]


def test_a_key_that_fields_gives_another_name_is_not_seen_under_its_own() -> None:
    row = {"text": "Hello", "question": "Hi"}
    assert turns(row, fields={"answer": "text"}) == [("user", "Hi"), ("assistant", "Hello")]
    assert "unknown format (keys: 'text'" in refused({"text": "Hello"}, fields={"answer": "text"})
    assert "unknown format" in refused({"text": "Hello"}, fields={"text": "a.b.c"})


def test_roles_name_the_speakers_of_any_row() -> None:
    row = {"conversations": [{"from": "Alice", "value": "Hi"}, {"from": "HAL", "value": "Hello"}]}
    assert turns(row, roles={"Alice": "user", "HAL": "assistant"}) == [("user", "Hi"), ("assistant", "Hello")]
    assert "unknown role 'HAL' (known: system, " in refused(row, roles={"Alice": "user"})


def test_an_unknown_format_is_met_with_the_keys_the_formats_and_the_way_out() -> None:
    complaint = refused({f"key{i}": 1 for i in range(10_000)})
    assert (
        "'key0', 'key1'" in complaint
        and "instances" in complaint
        and "name other keys in the source's fields" in complaint
    )


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a\0b"}, "NUL byte (character 2 of a text)"),
        ({"question": "a", "answer": "b\0"}, "NUL byte"),
        ({"text": "a", "id": True}, "'id' is a boolean, not a string"),
        ({"text": "a", "id": [1]}, "'id' is a list, not a string"),
        ({"text": "a", "task": "\ud800"}, "broken Unicode"),
        ({"text": float("nan")}, "'text' is a number, not a string"),
        ({"question": "a", "answer": b"b"}, "'answer' is binary data, not a string"),
        ({"question": "a", "answer": "b", "system": 1}, "'system' is a number, not a string"),
        ({"question": "a", "answer": "b", "tools": [1]}, "'tools' is no list of objects"),
        ({"question": "a", "answer": "b", "tools": ["\ud800"]}, "broken Unicode"),
        ({"question": "a", "answer": "b" * 2**23}, "too large (8,388,609 characters, at most 8,388,608); cut it up"),
        ({"question": "a", "answer": "b", "tools": [{"name": "x" * 2**23}]}, "too large"),
        ({"question": "a", "answer": "b", "tools": "{"}, "'tools' is no list of objects"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history' is no list of pairs of strings"),
        ({"messages": [{"role": 1, "content": "x"}]}, "'role' is a number, not a string"),
        ({"messages": [{"role": "user" * 100, "content": "x"}]}, "unknown role 'useruser"),
        ({"messages": [{"role": "user"}]}, "'content' is missing or null, not a string"),
        ({"prompt": [1], "completion": "a"}, "'prompt' is no list of objects"),
        (float("nan"), "not a JSON object but a number"),
        (b"[" * 100_000, "broken JSON (nested too deeply)"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "broken JSON (an integer of thousands of digits)"),
        (b'{"text": "a\0"}', "broken JSON (Invalid control character at"),
    ],
)
def test_what_no_one_means_is_a_bad_row(row: Any, complaint: str) -> None:
    assert complaint in refused(row)


def test_ids_are_kept_as_strings() -> None:
    assert [conversations({"text": "a", "id": name})[0].id for name in ("x", 7, None)] == ["x", "7", ""]


def test_a_bad_row_names_the_place_and_the_two_ways_out() -> None:
    error = bad_row_error("a.jsonl", 3, BadRow("broken JSON", " (column 2)"))
    assert str(error) == "a.jsonl, row 3: broken JSON (column 2); mend the row, or set data.on_bad_row: skip"
