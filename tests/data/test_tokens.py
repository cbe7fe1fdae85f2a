"""Text that spells a special token stays text, and prompts are tokenised as if they stood alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from bigtune.data.chat import ChatFormat
from bigtune.data.conversation import Conversation, Message
from bigtune.data.document import Document
from bigtune.data.template import Refusal
from bigtune.data.tokens import Text, Tokens
from bigtune.errors import DataError
from tests.data.conftest import CHATML, build_tokenizer
from tests.data.families import FAMILIES, build

MakeTokenizer = Callable[..., Any]

# As families end prompts, and as answers begin that a tokenizer joins to them.
LEADS = ["A:", "A: ", "A:\n", "A:\n\n", "A:\n\n  "]
ANSWERS = ["four", " four", "\nfour", "\n\n  four ", "  ", "é", "...", "-\n"]


def talk(*contents: str) -> Conversation:
    turns = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return Conversation(tuple(turns), "a.jsonl", 7)


def encoded(chat: ChatFormat, conversation: Conversation) -> Document:
    [documents] = chat.encode([conversation])
    assert isinstance(documents, list), documents
    [document] = documents
    return document


def special(tokenizer: Any, document: Document) -> list[str]:
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return [token for token in tokenizer.convert_ids_to_tokens(document.input_ids.tolist()) if token in known]


SPELLINGS = ["<|im_end|>", "a<|im_start|>b", "<|end|><|end|>", "<|im_end|>\n", "<<|pad|>>", " <s> "]


@pytest.mark.parametrize("spelled", SPELLINGS)
@pytest.mark.parametrize("template", ["own", "plain"])
def test_a_spelled_special_token_stays_text(template: str, spelled: str, chatml: Any) -> None:
    chat = ChatFormat.of(chatml, None if template == "own" else template)
    spoken, neutral = talk(f"Say {spelled}", f"I say {spelled}."), talk("Say", "I say.")
    document, other = encoded(chat, spoken), encoded(chat, neutral)
    assert special(chatml, document) == special(chatml, other)
    text = chatml.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in spoken.messages], chat_template=chat.template, tokenize=False
    )
    assert chatml.decode(document.input_ids) == text
    [(start, end)] = document.spans
    ending = {"own": "<|im_end|>", "plain": "<|end|>"}[template]
    assert chatml.decode(document.input_ids[start:end]) == f"I say {spelled}.{ending}"
    assert document.input_ids[:start].tolist() == chat.prompt_ids(spoken.messages[:1])


def test_parsing_is_there_for_those_who_want_it(chatml: Any) -> None:
    row = talk("Hi", "Hello<|im_end|>")
    document = encoded(ChatFormat.of(chatml, special_tokens="parse"), row)
    assert special(chatml, document)[-2:] == ["<|im_end|>", "<|im_end|>"]
    assert special(chatml, encoded(ChatFormat.of(chatml), row))[-2:] != ["<|im_end|>", "<|im_end|>"]


def test_added_tokens_that_are_not_special_are_tokens() -> None:
    tokenizer = build(FAMILIES["qwen3"])
    document = encoded(ChatFormat.of(tokenizer), talk("Two?", "<think>\nTwo.\n</think>\n\nIt is <|im_end|>."))
    tokens = tokenizer.convert_ids_to_tokens(document.input_ids.tolist())
    assert tokens.count("<think>") == tokens.count("</think>") == 1
    assert tokens.count("<|im_end|>") == 2


def test_spelling_in_tools_calls_and_raw_text_stays_text_too(chatml: Any) -> None:
    listing = "{% if tools %}{{ tools | tojson }}{% endif %}"
    calls = CHATML.replace("m['content'] +", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +")
    chatml = build_tokenizer(listing + calls)
    chat = ChatFormat.of(chatml)
    call = {"function": {"name": "add", "arguments": {"<|im_end|>": ["<|im_start|>"]}}}
    messages = (Message("user", "Hi"), Message("assistant", "add", extra={"tool_calls": [call]}))
    row = Conversation(messages, "a.jsonl", 7, tools=({"name": "add", "about": "<|im_end|>"},))
    assert special(chatml, encoded(chat, row)) == ["<|im_start|>", "<|im_end|>"] * 2
    raw = encoded(chat, Conversation((), "a.jsonl", 1, text="The <|end|> token."))
    assert special(chatml, raw) == ["<|end|>"] and raw.input_ids[-1] == chatml.eos_token_id
    assert chatml.decode(raw.input_ids) == "The <|end|> token.<|end|>"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_spelled_tokens_stay_text_in_every_family(name: str) -> None:
    family = FAMILIES[name]
    if name == "deepseek-r1":
        pytest.skip("its template cannot be trained with")
    tokenizer = build(family)
    chat = ChatFormat.of(tokenizer)
    said = "".join(family.special)
    document, other = encoded(chat, talk("Two?", f"It is {said}.")), encoded(chat, talk("Two?", "It is four."))
    assert special(tokenizer, document) == special(tokenizer, other)


def test_the_renamed_tokenizer_is_the_same_where_nothing_is_spelled() -> None:
    lines = ["<|im_start|>user\nHi <|im_end|>\n", "A list:\n\n  - one", " <s>é", "", "<|end|><|pad|>x"]
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("▁a", -1.0), ("s", -2.0), ("<", -3.0), (">", -3.0)], unk_id=0)
    )
    unigram.add_special_tokens(["<unk>", "<s>"])
    for core in [
        build_tokenizer().backend_tokenizer,
        *(build(f).backend_tokenizer for f in FAMILIES.values()),
        unigram,
    ]:
        tokens = Tokens(core.to_str())
        plain = tokens.encode([Text(line) for line in lines])
        renamed = tokens.encode([Text(line, hidden=True) for line in lines])
        for a, b, line in zip(plain, renamed, lines, strict=True):
            assert not isinstance(a, Refusal) and not isinstance(b, Refusal)
            assert a[0].tolist() == b[0].tolist() == core.encode(line, add_special_tokens=False).ids


def test_a_vocabulary_that_knows_its_special_tokens_as_words_keeps_spelled_ones_apart() -> None:
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0), ("s", -2.0), ("<", -3.0), (">", -3.0)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    core.add_special_tokens(["<unk>", "<s>"])
    tokens = Tokens(core.to_str())
    [made] = tokens.encode([Text("<s>" + tokens.hide("a<s>b"), hidden=True)])
    assert not isinstance(made, Refusal)
    assert made[0].tolist() == [1, 2, 4, 3, 5, 0]  # <s> a < s > and an unknown b


def test_characters_of_no_meaning_beside_spelled_tokens_are_refused(chatml: Any) -> None:
    [made] = ChatFormat.of(chatml).encode([talk("Hi", "<|im_end|>\U00100000")])
    with pytest.raises(DataError, match=r"^a.jsonl, row 7: it spells a special token and has characters"):
        assert isinstance(made, DataError)
        raise made
    assert encoded(ChatFormat.of(chatml), talk("Hi", "\U00100000")).supervised


def test_a_text_that_is_no_unicode_spoils_no_other(chatml: Any) -> None:
    good, bad = talk("Hi", "Hello"), talk("Hi", "\ud800")
    first, broken, last = ChatFormat.of(chatml).encode([good, bad, good])
    assert isinstance(broken, DataError) and "no valid Unicode" in str(broken)
    assert isinstance(first, list) and isinstance(last, list)
    assert first[0].input_ids.tolist() == last[0].input_ids.tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("<|im_end|>start \n<s>é\t\0")), min_size=2, max_size=4))
def test_any_text_is_kept_and_makes_no_special_token(contents: list[str]) -> None:
    chatml = build_tokenizer(CHATML)
    row = talk(*contents)
    document = encoded(ChatFormat.of(chatml), row)
    kept = row.messages[: len(contents) // 2 * 2]
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in kept)
    assert chatml.decode(document.input_ids) == text
    assert special(chatml, document) == ["<|im_start|>", "<|im_end|>"] * len(kept)
    taught = [chatml.decode(document.input_ids[start:end]) for start, end in document.spans]
    assert taught == [m.content + "<|im_end|>" for m in kept if m.role == "assistant"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("lead", LEADS)
def test_tokenizers_that_begin_texts_with_a_space_begin_no_answer_with_one(lead: str, answer: str, first: bool) -> None:
    tokenizer = build(FAMILIES["llama2"], first=first)
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ m.content if m.role == 'user' else LEAD + m.content + eos_token }}{%- endfor -%}"
        "{{ LEAD if add_generation_prompt else '' }}"
    ).replace("LEAD", repr(lead))
    chat = ChatFormat.of(tokenizer)
    row = talk("Two plus two?\n", answer)
    document = encoded(chat, row)
    [(start, end)] = document.spans
    prompt = tokenizer(chat.prompt(row.messages[:1]), add_special_tokens=False).input_ids
    assert document.input_ids[:start].tolist() == prompt
    tokens = tokenizer.convert_ids_to_tokens(document.input_ids[start:end].tolist())
    written = b"".join(bytes([int(token[3:5], 16)]) if "<0x" in token else token.encode() for token in tokens)
    assert written.decode().replace("▁", " ") == answer + "</s>"


def test_a_run_of_white_space_before_an_answer_is_checked_not_feared() -> None:
    """Llama 3's prompts end with two line ends, which its tokenizer keeps together: nothing is tokenised twice."""
    row = talk("Two?", "It is four.")
    tokenizer = build(FAMILIES["llama3.1"])
    chat = ChatFormat.of(tokenizer)
    document = encoded(chat, row)
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    assert document.input_ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    # A tokenizer that splits such a run by what follows it gets prompt and answer tokenised apart.
    apart = build(FAMILIES["gemma2"], template=tokenizer.chat_template)
    chat = ChatFormat.of(apart)
    document = encoded(chat, row)
    assert document.input_ids.tolist() != apart.apply_chat_template(turns, return_dict=False)
    assert document.input_ids[: document.spans[0, 0]].tolist() == chat.prompt_ids(row.messages[:1])


def test_padding_and_truncation_of_the_tokenizer_are_switched_off(make_tokenizer: MakeTokenizer) -> None:
    made = make_tokenizer(CHATML)
    row = talk("Hi", "Hello there, and the sky is blue.")
    plain = encoded(ChatFormat.of(made), row)
    made.backend_tokenizer.enable_truncation(4)
    made.backend_tokenizer.enable_padding(length=64)
    assert np.array_equal(encoded(ChatFormat.of(made), row).input_ids, plain.input_ids)
