from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Data, Evaluate
from bigtune.data.chat import ChatFormat
from bigtune.data.conversation import Message
from bigtune.data.formats import ReadCounts, read_conversations
from bigtune.errors import DataError
from bigtune.evaluate.prompts import Item, build_items, encoder

Write = Callable[..., Path]


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    return [{"question": f"{task} question {i}?", "answer": f"{task} answer {i}", "task": task} for i in range(count)]


def items_of(tokenizer: Any, test: Path, train: Path, seed: int = 0, **settings: Any) -> list[Item]:
    evaluate = Evaluate.model_validate({"sources": [{"path": test}], **settings})
    return build_items(evaluate, Data.model_validate({"sources": [{"path": train}]}), tokenizer, seed)


def test_plain_prompts_are_few_shot_text_with_answers_ended_by_a_blank_line(tokenizer: Any, write: Write) -> None:
    test = write("test.jsonl", [{"question": "How many?", "answer": "4 + 3\n\n\n#### 7"}])
    train = write("train.jsonl", [{"question": "What colour?", "answer": "red"}])
    (item,) = items_of(tokenizer, test, train, prompt="plain", shots=1)
    assert tokenizer.decode(item.prompt_ids) == "What colour?\nAnswer: red\n\nHow many?\nAnswer:"
    assert tokenizer.decode(item.answer_ids) == " 4 + 3\n#### 7\n\n"
    assert (item.question, item.reference) == ("How many?", "4 + 3\n\n\n#### 7")


def test_the_end_of_a_plain_answer_has_the_tokens_it_has_between_examples(tokenizer: Any, write: Write) -> None:
    path = write("test.jsonl", [{"question": "How many?", "answer": "red"}, {"question": "Who?", "answer": "red"}])
    item = items_of(tokenizer, path, path, prompt="plain", shots=1)[0]
    answer, prompt = list(item.answer_ids), list(item.prompt_ids)
    assert any(prompt[at : at + len(answer)] == answer for at in range(len(prompt)))


def test_chat_prompts_are_those_of_training_and_of_inference(tokenizer: Any, write: Write) -> None:
    test = write("test.jsonl", [{"question": "How many?", "answer": "7"}])
    train = write("train.jsonl", [{"question": "What colour?", "answer": "red"}])
    (item,) = items_of(tokenizer, test, train, shots=1)
    turns = [Message("user", "What colour?"), Message("assistant", "red"), Message("user", "How many?")]
    text = ChatFormat.of(tokenizer).prompt(turns)
    assert item.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(item.answer_ids) == "7</s>"


def test_the_last_answer_is_the_reference_and_the_system_turn_stays_first(tokenizer: Any, write: Write) -> None:
    def talk(*said: str) -> dict[str, Any]:
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]}

    test = write("test.jsonl", [talk("Be brief.", "One?", "1", "Two?", "2", "Thanks.")])
    train = write("train.jsonl", [talk("Be rude.", "Three?", "3")])
    (item,) = items_of(tokenizer, test, train, shots=1)
    prompt = tokenizer.decode(item.prompt_ids)
    assert item.reference == "2"
    assert prompt.startswith("Be brief.") and "rude" not in prompt and "Thanks" not in prompt
    assert prompt.index("Three?") < prompt.index("One?") < prompt.index("Two?")


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_a_question_is_never_among_its_own_examples(tokenizer: Any, write: Write, prompt: str) -> None:
    path = write("rows.jsonl", rows_of("sums", 5) * 2)  # every question twice, too
    for item in items_of(tokenizer, path, path, prompt=prompt, shots=4):
        text = tokenizer.decode(item.prompt_ids)
        assert text.count(item.question) == 1
        assert text.count("sums question") == 5


def test_examples_are_of_the_questions_own_task(tokenizer: Any, write: Write) -> None:
    train = write("train.jsonl", rows_of("sums", 6) + rows_of("names", 6))
    test = write("test.jsonl", [{"question": "Q?", "answer": "A", "task": "names"}])
    (item,) = items_of(tokenizer, test, train, shots=3)
    text = tokenizer.decode(item.prompt_ids)
    assert text.count("names question") == 3 and "sums" not in text


def test_examples_depend_on_the_seed_alone(tokenizer: Any, write: Write) -> None:
    rows = rows_of("sums", 20)
    test = write("test.jsonl", [{"question": f"Q{i}?", "answer": "A", "task": "sums"} for i in range(3)])
    forward, backward = write("train.jsonl", rows), write("backward.jsonl", rows[::-1])

    def examples(train: Path, seed: int) -> list[str]:
        items = items_of(tokenizer, test, train, seed, prompt="plain", shots=3)
        return [tokenizer.decode(item.prompt_ids).partition("Q")[0] for item in items]

    first = examples(forward, 1)
    assert len(set(first)) == 1
    assert first == examples(backward, 1)
    assert first != examples(forward, 2)


def test_shots_from_replaces_the_training_sources(tokenizer: Any, write: Write) -> None:
    test = write("test.jsonl", [{"question": "Q?", "answer": "A"}])
    shots = write("shots.jsonl", rows_of("names", 2))
    (item,) = items_of(tokenizer, test, test, shots=1, shots_from=[{"path": shots}])
    assert "names question" in tokenizer.decode(item.prompt_ids)


def test_max_rows_samples_from_the_whole_file_and_keeps_its_order(tokenizer: Any, write: Write) -> None:
    path = write("rows.jsonl", rows_of("sums", 100))
    kept = [int(item.question.split()[2][:-1]) for item in items_of(tokenizer, path, path, max_rows=10)]
    assert len(kept) == 10 and kept == sorted(kept) and kept[-1] > 20
    again = items_of(tokenizer, path, path, max_rows=10)
    assert kept == [int(item.question.split()[2][:-1]) for item in again]


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([], {}, "no row to evaluate on"),
        ([{"text": "Only text."}], {}, "row 1: an evaluation row needs a question"),
        (rows_of("sums", 3), {"shots": 3}, "2 other rows of task 'sums'"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(
    tokenizer: Any, write: Write, rows: list[dict[str, Any]], settings: dict[str, Any], said: str
) -> None:
    path = write("rows.jsonl", rows)
    with pytest.raises(DataError, match=said):
        items_of(tokenizer, path, path, **settings)


def test_text_in_an_answer_that_spans_tokens_is_kept_whole(tokenizer: Any) -> None:
    from bigtune.data.conversation import Conversation

    turns = (Message("user", "Naïve?"), Message("assistant", "é🙂"))
    [pair] = encoder("plain", tokenizer)([Conversation(turns, "x", 1)])
    assert isinstance(pair, tuple)
    prompt, answer = pair
    assert tokenizer.decode(prompt) == "Naïve?\nAnswer:"
    assert tokenizer.decode(answer) == " é🙂\n\n"


TOOL_TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL_ROW = {
    "messages": [{"role": "user", "content": "How many eggs?"}, {"role": "assistant", "content": "12"}],
    "tools": [{"type": "function", "function": {"name": "count_eggs"}}],
}


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
@pytest.mark.parametrize("renamed", [False, True])
def test_what_is_asked_and_answered_is_the_document_of_training(
    tokenizer: Any, write: Write, tmp_path: Path, special_tokens: str, renamed: bool
) -> None:
    """Everything of `data` that decides on token ids: tools, template, special tokens, fields and roles."""
    template = tmp_path / "tools.jinja"
    template.write_text(TOOL_TEMPLATE)
    naming: dict[str, Any] = {}
    said = [("user", "Is <s> text?"), ("assistant", "12")]
    row: dict[str, Any] = {**TOOL_ROW, "messages": [{"role": role, "content": content} for role, content in said]}
    if renamed:
        row = {"talk": [{"role": f"my {turn['role']}", "content": turn["content"]} for turn in row["messages"]]}
        naming = {"fields": {"messages": "talk"}, "roles": {"my user": "user", "my assistant": "assistant"}}
    path = write("rows.jsonl", [row])
    source = {"path": path, **naming}
    data = Data.model_validate(
        {"sources": [source], "holdout": 0.5, "chat_template": str(template), "special_tokens": special_tokens}
    )
    chat = ChatFormat.of(tokenizer, str(template), data.supervise, data.special_tokens)
    ((document,),) = chat.encode(list(read_conversations(data.sources, "error")))  # type: ignore[misc]
    for sources in ([source], None):
        evaluate = Evaluate.model_validate({"sources": sources})
        (item,) = build_items(evaluate, data, tokenizer, seed=0, below=2**64)
        end = int(document.spans[-1, 1])
        assert [*item.prompt_ids, *item.answer_ids] == document.input_ids[:end].tolist()
        assert (tokenizer.bos_token_id in item.prompt_ids) == (special_tokens == "parse")
        assert ("TOOLS" in tokenizer.decode(item.prompt_ids)) != renamed


def test_the_tools_of_a_question_stand_before_its_examples(tokenizer: Any, write: Write, tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(TOOL_TEMPLATE)
    test, train = write("test.jsonl", [TOOL_ROW]), write("train.jsonl", rows_of("sums", 1))
    data = Data.model_validate({"sources": [{"path": train}], "chat_template": str(template)})
    evaluate = Evaluate.model_validate({"sources": [{"path": test}], "shots": 1})
    (item,) = build_items(evaluate, data, tokenizer, seed=0)
    assert tokenizer.decode(item.prompt_ids).startswith("TOOLS") and "sums" in tokenizer.decode(item.prompt_ids)


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_a_plain_prompt_takes_spelled_special_tokens_as_the_run_file_says(
    tokenizer: Any, write: Write, special_tokens: str
) -> None:
    path = write("rows.jsonl", [{"question": "How many?", "answer": "7 </s>"}])
    data = Data.model_validate({"sources": [{"path": path}], "special_tokens": special_tokens})
    evaluate = Evaluate.model_validate({"sources": [{"path": path}], "prompt": "plain"})
    (item,) = build_items(evaluate, data, tokenizer, seed=0)
    assert tokenizer.decode(item.answer_ids) == " 7 </s>\n\n"
    assert (tokenizer.eos_token_id in item.answer_ids) == (special_tokens == "parse")


def skipping(*paths: Path, **settings: Any) -> Data:
    """With bigtune's plain template, which has no place for tools and so refuses rows with them."""
    sources = [{"path": path} for path in paths]
    return Data.model_validate({"sources": sources, "chat_template": "plain", "on_bad_row": "skip", **settings})


def test_rows_that_cannot_be_asked_are_named_or_counted(tokenizer: Any, write: Write) -> None:
    path = write("rows.jsonl", [*rows_of("sums", 2), TOOL_ROW, {"text": "Only text."}])
    data, evaluate, counts = skipping(path), Evaluate.model_validate({"sources": [{"path": path}]}), ReadCounts()
    assert [item.question for item in build_items(evaluate, data, tokenizer, 0, counts)] == [
        "sums question 0?",
        "sums question 1?",
    ]
    assert counts.skipped == {
        "an evaluation row needs a question and an assistant's answer to it": 1,
        "refused by the chat template": 1,
    }
    path = write("rows.jsonl", [*rows_of("sums", 2), TOOL_ROW])
    with pytest.raises(DataError, match=r"rows.jsonl, row 3: refused .*tools.*set data.on_bad_row: skip$") as caught:
        build_items(evaluate, skipping(path, on_bad_row="error"), tokenizer, 0)
    assert str(caught.value).count("row 3") == 1
    write("rows.jsonl", [TOOL_ROW])
    with pytest.raises(DataError, match=r"no row to evaluate on is left \(1 × refused by the chat template\)$"):
        build_items(evaluate, data, tokenizer, 0)


WITHOUT_TOOL_TURNS = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tool turns') }}{% endif %}"
    "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
)


def test_an_example_that_the_template_refuses_does_not_spoil_the_questions(
    tokenizer: Any, write: Write, tmp_path: Path
) -> None:
    def talk(*said: str) -> dict[str, Any]:
        roles = ["user", "assistant", "tool", "assistant"]
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]}

    template = tmp_path / "no_tools.jinja"
    template.write_text(WITHOUT_TOOL_TURNS)
    train = [talk(f"Bad {i}?", "I count.", "7", "Seven.") for i in range(20)] + [
        talk(f"Fine {i}?", "Yes.") for i in range(4)
    ]
    sources = [{"path": write("test.jsonl", [{"question": "Q?", "answer": "A"}])}]
    evaluate = Evaluate.model_validate({"sources": sources, "shots": 3})
    data = skipping(write("train.jsonl", train), chat_template=str(template))
    (item,) = build_items(evaluate, data, tokenizer, 0)
    text = tokenizer.decode(item.prompt_ids)
    assert text.count("Fine") == 3 and "Bad" not in text
    with pytest.raises(DataError, match="no tool turns"):
        build_items(evaluate, data.model_copy(update={"on_bad_row": "error"}), tokenizer, 0)
