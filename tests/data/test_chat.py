"""The model learns the answers and where they stop, from exactly the prompts that it is asked with later."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtune.data.chat import ChatFormat, load_tokenizer
from bigtune.data.conversation import Conversation, Message
from bigtune.data.document import Document
from bigtune.errors import DataError, ModelError

MakeTokenizer = Callable[..., Any]


def talk(*contents: str, system: str = "") -> Conversation:
    turns = [Message("system", system)] if system else []
    turns += [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return Conversation(tuple(turns), "a.jsonl", 7)


def encode(chat: ChatFormat, *conversations: Conversation) -> list[Document]:
    """The documents of conversations that give one each; a refused row is raised."""
    documents = []
    for made in chat.encode(conversations):
        if isinstance(made, DataError):
            raise made
        [document] = made
        documents.append(document)
    return documents


def supervised(tokenizer: Any, document: Document) -> list[str]:
    return [tokenizer.decode(document.input_ids[start:end]) for start, end in document.spans]


def test_every_answer_and_its_end_of_turn_are_supervised(tokenizer: Any, chatml: Any) -> None:
    conversation = talk("Hi", "Hello there.", "And?", "The sky is blue.", system="Be kind.")
    for made, end in ((tokenizer, "<|end|>"), (chatml, "<|im_end|>")):
        [document] = encode(ChatFormat.of(made), conversation)
        assert document.input_ids.dtype == document.spans.dtype == np.int32
        assert supervised(made, document) == [f"Hello there.{end}", f"The sky is blue.{end}"]
        assert document.supervised == sum(int(end - start) for start, end in document.spans)


def test_a_template_of_its_own_is_used_and_the_plain_one_is_told_of(tokenizer: Any, chatml: Any) -> None:
    question = [Message("user", "Hi")]
    assert ChatFormat.of(chatml).prompt(question) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatFormat.of(tokenizer).prompt(question) == "### Instruction:\nHi\n\n### Response:\n"
    assert (ChatFormat.of(tokenizer).name, ChatFormat.of(chatml).name) == ("plain", "model")


# Answers that a tokenizer would merge with the prompt's end, and prompts that it splits by what follows.
@pytest.mark.parametrize("answer", ["four", " four", "\nfour", "\n\n  four ", "  ", "é", "...", "-\n"])
@pytest.mark.parametrize("lead", ["A:", "A: ", "A:\n", "A:\n\n", "A:\n\n  "])
def test_prompt_tokens_are_those_seen_at_inference(tokenizer: Any, lead: str, answer: str) -> None:
    template = (
        "{%- for m in messages -%}"
        "{{ m['content'] if m['role'] == 'user' else LEAD + m['content'] + eos_token }}"
        "{%- endfor -%}{{ LEAD if add_generation_prompt else '' }}"
    ).replace("LEAD", repr(lead))
    chat = dataclasses.replace(ChatFormat.of(tokenizer), template=template)
    conversation = talk("Two plus two?\n", answer, "again?", answer)
    [document] = encode(chat, conversation)
    prompt = tokenizer(chat.prompt(conversation.messages[:1]), add_special_tokens=False).input_ids
    assert document.input_ids[: document.spans[0, 0]].tolist() == prompt
    assert supervised(tokenizer, document) == [answer + "<|end|>"] * 2


def test_raw_text_is_supervised_whole_and_ended(tokenizer: Any, make_tokenizer: MakeTokenizer) -> None:
    text = Conversation((), "a.jsonl", 1, text="The sky is blue.")
    [document] = encode(ChatFormat.of(tokenizer), text)
    assert tokenizer.decode(document.input_ids) == "The sky is blue.<|end|>"
    assert document.spans.tolist() == [[1, len(document.input_ids)]]  # nothing predicts the first token
    begun = make_tokenizer(bos=True)
    [document] = encode(ChatFormat.of(begun), text)
    assert begun.decode(document.input_ids) == "<s>The sky is blue.<|end|>"


def test_many_documents_come_back_in_order(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    conversations = [talk("Hi", "one"), Conversation((), "a", 1, text="two"), talk("Hi", "\n\nthree")]
    together = encode(chat, *conversations)
    for document, conversation in zip(together, conversations, strict=True):
        [alone] = encode(chat, conversation)
        assert document.input_ids.tolist() == alone.input_ids.tolist()
        assert document.spans.tolist() == alone.spans.tolist()
    assert chat.encode([]) == []


def test_a_question_without_an_answer_at_the_end_is_left_out(chatml: Any) -> None:
    chat = ChatFormat.of(chatml)
    document, shorter = encode(chat, talk("Hi", "Hello", "And?"), talk("Hi", "Hello"))
    assert document.input_ids.tolist() == shorter.input_ids.tolist()


def test_a_template_that_drops_earlier_answers_gives_a_document_an_answer(
    make_tokenizer: MakeTokenizer, chatml: Any
) -> None:
    kept = "(m['content'] if loop.last or m['role'] == 'user' else '…') +"
    made = make_tokenizer(chatml.chat_template.replace("m['content'] +", kept))
    [documents] = ChatFormat.of(made).encode([talk("Hi", "Hello", "And?", "Yes.")])
    assert not isinstance(documents, DataError)
    assert [supervised(made, document) for document in documents] == [["Hello<|im_end|>"], ["Yes.<|im_end|>"]]


def test_a_template_that_refuses_a_row_is_quoted(make_tokenizer: MakeTokenizer) -> None:
    made = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"^a.jsonl, row 7: .*roles must alternate"):
        encode(ChatFormat.of(made), talk("Hi", "Hello"))


def test_a_chat_of_so_many_turns_that_it_would_take_minutes_is_refused(chatml: Any) -> None:
    chat = ChatFormat.of(chatml)
    many = talk(*["Hi"] * 5000)
    with pytest.raises(DataError, match=r"row 7: it is too large \(2,500 answers in 330,000 characters\); cut it up"):
        encode(chat, many)
    assert len(encode(chat, talk(*["Hi"] * 200))[0].spans) == 100
    [document] = encode(ChatFormat.of(chatml, supervise="last"), many)  # of which one answer is rendered
    assert len(document.spans) == 1


def test_a_tokenizer_without_an_end_is_refused(make_tokenizer: MakeTokenizer) -> None:
    made = make_tokenizer()
    made.eos_token = None
    with pytest.raises(ModelError, match=r"no eos_token"):
        ChatFormat.of(made)


def test_a_model_folder_without_a_whole_tokenizer_is_one_line(tmp_path: Path, model_path: Path) -> None:
    assert load_tokenizer(model_path).eos_token == "<|end|>"
    with pytest.raises(ModelError, match=r"no such model folder"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_is_loaded_as_transformers_alone_would(
    tmp_path: Path, model_path: Path, kind: str, model_type: str
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    shutil.copytree(model_path, tmp_path / "m")
    named = tmp_path / "m" / "tokenizer_config.json"
    named.write_text(json.dumps({**json.loads(named.read_text()), "tokenizer_class": kind}))
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "m")
    ours, theirs = load_tokenizer(tmp_path / "m"), AutoTokenizer.from_pretrained(str(tmp_path / "m"))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
