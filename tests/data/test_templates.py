"""Real chat templates: what is learnt is the answer and its end, from exactly the prompt that inference shows."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from bigtune.data import turns
from bigtune.data.chat import ChatFormat
from bigtune.data.conversation import Conversation, Message
from bigtune.data.document import Document
from bigtune.data.template import turns_of
from bigtune.errors import DataError
from tests.data.families import FAMILIES, build

FOUR, SIX = "It is four.", "It is six."
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
USED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'


Turns = tuple[Message, ...]


@cache
def tokenizer_of(name: str) -> Any:
    return build(FAMILIES[name])


def talk(*contents: str, system: str = "") -> Turns:
    said = tuple(Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents))
    return (Message("system", system), *said) if system else said


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token by token, since decoding at once drops the space of a first word."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return "".join(tokens).replace("▁", " ") if "▁" in tokenizer.get_vocab() else str(tokenizer.decode(list(ids)))


def learn(name: str, messages: Turns, tools: tuple[Any, ...] = (), **options: Any) -> list[Document] | DataError:
    chat = ChatFormat.of(tokenizer_of(name), **options)
    [made] = chat.encode([Conversation(messages, "a.jsonl", 7, tools=tools)])
    return made


def rendered(name: str, messages: Sequence[Message], tools: tuple[Any, ...], prompt: bool) -> list[int]:
    """Token ids by transformers' own way."""
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template(
        turns_of(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def assert_learnt(name: str, messages: Turns, expected: list[dict[int, str]], tools: tuple[Any, ...] = ()) -> None:
    """Each document is what transformers renders up to its last answer, and teaches just the `expected` answers.

    These are given by turn. Before each stand the tokens of the prompt that transformers would ask it with.
    """
    documents = learn(name, messages, tools)
    assert not isinstance(documents, DataError), documents
    tokenizer = tokenizer_of(name)
    assert len(documents) == len(expected)
    for document, answers in zip(documents, expected, strict=True):
        ids = document.input_ids.tolist()
        assert ids == rendered(name, messages[: max(answers) + 1], tools, prompt=False)
        taught = [text_of(tokenizer, ids[start:end]) for start, end in document.spans]
        assert taught == list(answers.values())
        for turn, (start, _) in zip(answers, document.spans.tolist(), strict=True):
            prompt = rendered(name, messages[:turn], tools, prompt=True)
            assert ids[: len(prompt)] == prompt
            assert start == len(prompt) or "<|im_start|>" in answers[turn]  # SmolLM 3 has headers learnt too


# What ends a turn, and what stands between the prompt and the words.
ENDS = {
    "qwen2.5": ("", "<|im_end|>"),
    "qwen2.5-base": ("", "<|im_end|>"),  # not the tokenizer's end-of-text token
    "llama2": (" ", " </s>"),
    "llama3.1": ("", "<|eot_id|>"),
    "mistral-v0.3": ("  ", "</s>"),  # the template's space and the tokenizer's
    "gemma2": ("", "<end_of_turn>"),
    "gemma3": ("", "<end_of_turn>"),
    "phi3": ("", "<|end|>"),  # not the <|endoftext|> at the conversation's end
    "phi4": ("", "<|im_end|>"),
    "deepseek-v2": (" ", "<｜end▁of▁sentence｜>"),
    "zephyr": ("", "</s>"),
    "olmo2": ("", "<|endoftext|>"),
    "granite3": ("", "<|end_of_text|>"),
    "smollm3": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "command-r": ("", "<|END_OF_TURN_TOKEN|>"),
}
WITHOUT_SYSTEM = {"gemma2", "mistral-v0.3"}


@pytest.mark.parametrize("name", ENDS)
def test_a_single_answer(name: str) -> None:
    before, after = ENDS[name]
    assert_learnt(name, talk("Two plus two?", FOUR), [{1: before + FOUR + after}])


@pytest.mark.parametrize("name", ENDS)
def test_every_answer_of_many_turns_in_one_document(name: str) -> None:
    before, after = ENDS[name]
    messages = talk("Two plus two?", FOUR, "And three plus three?", SIX, "Thanks.")
    assert_learnt(name, messages, [{1: before + FOUR + after, 3: before + SIX + after}])


@pytest.mark.parametrize("name", sorted(ENDS.keys() - WITHOUT_SYSTEM))
def test_a_system_turn_is_context(name: str) -> None:
    before, after = ENDS[name]
    messages = talk("Two plus two?", FOUR, "And three plus three?", SIX, system="Be kind.")
    assert_learnt(name, messages, [{2: before + FOUR + after, 4: before + SIX + after}])


@pytest.mark.parametrize("name", ENDS)
def test_a_wrong_mask_would_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = ENDS[name]
    messages, expected = talk("Two plus two?", FOUR), [{1: before + FOUR + after}]
    ended = "_ended" if name == "smollm3" else "_end_of_turn"

    def without_end(*given: Any) -> Any:  # the mask of a trainer that leaves the end of a turn out
        core = given[1]
        end = core.rindex(FOUR) + len(FOUR)
        return [(given[2][-1][0], end)] if name == "smollm3" else end

    monkeypatch.setattr(turns.Drawing, ended, without_end)
    with pytest.raises(AssertionError):
        assert_learnt(name, messages, expected)


def test_qwen3_learns_each_answer_with_its_own_reasoning() -> None:
    messages = talk(
        "Two plus two?", f"<think>\nI add two and two.\n</think>\n\n{FOUR}", "And three plus three?",
        f"<think>\nI add three and three.\n</think>\n\n{SIX}", system="Be kind.",
    )  # fmt: skip
    # The first answer loses its reasoning once the second follows.
    expected = [
        {2: f"<think>\nI add two and two.\n</think>\n\n{FOUR}<|im_end|>"},
        {4: f"<think>\nI add three and three.\n</think>\n\n{SIX}<|im_end|>"},
    ]
    assert_learnt("qwen3", messages, expected)
    kept = learn("qwen3", messages)
    assert isinstance(kept, list)
    assert "two and two" not in tokenizer_of("qwen3").decode(kept[1].input_ids)


def test_qwen3_takes_reasoning_apart_from_the_content() -> None:
    answer = Message("assistant", FOUR, extra={"reasoning_content": "I add two and two."})
    messages = (Message("user", "Two plus two?"), answer)
    assert_learnt("qwen3", messages, [{1: f"<think>\nI add two and two.\n</think>\n\n{FOUR}<|im_end|>"}])


def test_qwen3_without_reasoning_learns_the_empty_thought_that_its_template_writes() -> None:
    messages = talk("Two plus two?", FOUR, "And three plus three?", SIX)
    thought = "<think>\n\n</think>\n\n"
    assert_learnt("qwen3", messages, [{1: f"{thought}{FOUR}<|im_end|>"}, {3: f"{thought}{SIX}<|im_end|>"}])


def test_qwen3_keeps_the_reasoning_between_tool_calls_in_one_document() -> None:
    messages = (
        Message("user", "Two plus two?"),
        Message("assistant", "", extra={"reasoning_content": "I add.", "tool_calls": [CALL]}),
        Message("tool", "4", extra={"name": "add", "tool_call_id": "call00001"}),
        Message("assistant", FOUR, extra={"reasoning_content": "It is."}),
        Message("user", "And three plus three?"),
        Message("assistant", SIX, extra={"reasoning_content": "I add three and three."}),
    )
    expected = [
        {1: f"<think>\nI add.\n</think>\n\n{USED}", 3: f"<think>\nIt is.\n</think>\n\n{FOUR}<|im_end|>"},
        {5: f"<think>\nI add three and three.\n</think>\n\n{SIX}<|im_end|>"},
    ]
    assert_learnt("qwen3", messages, expected, tools=(ADD,))


@pytest.mark.parametrize(
    ("name", "call", "after"),
    [
        ("qwen2.5", USED, "<|im_end|>"),
        ("llama3.1", '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>', "<|eot_id|>"),
    ],
)
def test_tool_calls_are_learnt_and_tool_results_are_not(name: str, call: str, after: str) -> None:
    messages = (
        Message("user", "Two plus two?"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "4", extra={"name": "add", "tool_call_id": "call00001"}),
        Message("assistant", FOUR),
    )
    assert_learnt(name, messages, [{1: call, 3: FOUR + after}], tools=(ADD,))


@pytest.mark.parametrize(
    ("name", "messages", "tools", "reason"),
    [
        # The prompt opens a thought that the rendered answer lacks.
        ("deepseek-r1", talk("Two plus two?", FOUR), (), r"turn 2 otherwise than its generation prompt"),
        # The system turn stands in the last question, but only while no answer follows.
        ("mistral-v0.3", talk("Two?", FOUR, system="Be kind."), (), r"turn 3 otherwise than its generation prompt"),
        ("gemma2", talk("Two?", FOUR, system="Be kind."), (), r"System role not supported"),
        ("gemma2", talk("Two?", FOUR), (ADD,), r"it has tools, and the chat template has no place for them"),
        (
            "phi4",
            (Message("user", "Two?"), Message("assistant", FOUR, extra={"tool_calls": [CALL]})),
            (),
            r"leaves out a tool call of turn 2",
        ),
        (
            "phi4",
            (Message("user", "Two?"), Message("assistant", FOUR, extra={"reasoning_content": "I add."})),
            (),
            r"leaves out the reasoning of turn 2",
        ),
        (
            "llama3.1",
            (Message("user", "Two?"), Message("assistant", "Wait.", extra={"tool_calls": [CALL]})),
            (ADD,),
            r"leaves out the content of turn 2",
        ),
    ],
)
def test_what_a_template_cannot_teach_exactly_is_refused(
    name: str, messages: Turns, tools: tuple[Any, ...], reason: str
) -> None:
    made = learn(name, messages, tools)
    assert isinstance(made, DataError)
    assert str(made).startswith("a.jsonl, row 7: ") and "\n" not in str(made)
    with pytest.raises(DataError, match=reason):
        raise made


def test_deepseek_r1_after_a_tools_result_is_learnt() -> None:
    messages = (*talk("Two plus two?", "Let me see.")[:1], Message("tool", "4"), Message("assistant", FOUR))
    assert_learnt("deepseek-r1", messages, [{2: f"{FOUR}<｜end▁of▁sentence｜>"}])


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "zephyr", "gemma3", "command-r", "smollm3"])
def test_other_roles_are_learnt_without_their_headers(name: str) -> None:
    end = {"smollm3": "<|im_end|>"}.get(name, ENDS[name][1])
    documents = learn(name, talk("Two plus two?", FOUR, "Thanks.", "Bye."), supervise=("user",))
    assert isinstance(documents, list)
    [document] = documents
    taught = [text_of(tokenizer_of(name), document.input_ids[start:end].tolist()) for start, end in document.spans]
    assert taught == [f"Two plus two?{end}", f"Thanks.{end}"]


def test_the_generation_blocks_of_smollm3_give_the_mask_that_transformers_gives() -> None:
    messages = talk("Two plus two?", FOUR, "And three plus three?", SIX, system="/no_think Be kind.")
    documents = learn("smollm3", messages)
    assert isinstance(documents, list)
    [document] = documents
    theirs = tokenizer_of("smollm3").apply_chat_template(
        turns_of(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    ours = [0] * len(document.input_ids)
    for start, end in document.spans:
        ours[start:end] = [1] * int(end - start)
    assert document.input_ids.tolist() == theirs["input_ids"]
    assert ours == theirs["assistant_masks"] and 0 < sum(ours) < len(ours)
