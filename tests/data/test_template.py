"""Templates are found by name or file, render as transformers renders them, and say where they are broken."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtune.data.chat import ChatFormat
from bigtune.data.conversation import Conversation, Message
from bigtune.data.document import Document
from bigtune.data.template import Refusal, Template, template_names
from bigtune.errors import ConfigError, ModelError

MakeTokenizer = Callable[..., Any]

TALK = (
    Message("user", "Hi"),
    Message("assistant", "Hello there."),
    Message("user", " And? "),
    Message("assistant", "The sky is blue."),
)
# What bigtune rendered for models without a template when it had no others.
OLD_PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- else -%}{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)
NEEDED = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
# The second prompt, from after the first answer, and the last answer.
RENDERED = {
    "plain": ("### Instruction:\n And? \n\n### Response:\n", "The sky is blue.<|end|>"),
    "raw": (" And? ", "The sky is blue.<|end|>"),
    "alpaca": ("\n\n### Instruction:\n And? \n\n### Response:\n", "The sky is blue.<|end|>"),
    "chatml": ("\n<|im_start|>user\n And? <|im_end|>\n<|im_start|>assistant\n", "The sky is blue.<|im_end|>"),
    "llama2": ("<s>[INST] And? [/INST]", " The sky is blue. <|end|>"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "The sky is blue.<|eot_id|>",
    ),
    "mistral": ("[INST] And?[/INST]", " The sky is blue.<|end|>"),
    "gemma": ("\n<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n", "The sky is blue.<end_of_turn>"),
    "phi3": ("\n<|user|>\n And? <|end|>\n<|assistant|>\n", "The sky is blue.<|end|>"),
    "vicuna": ("USER: And? ASSISTANT:", " The sky is blue.<|end|>"),
    "zephyr": ("\n<|user|>\n And? <|end|>\n<|assistant|>\n", "The sky is blue.<|end|>"),
}


def encoded(chat: ChatFormat, messages: tuple[Message, ...]) -> Document:
    [documents] = chat.encode([Conversation(messages, "a.jsonl", 7)])
    assert isinstance(documents, list), documents
    [document] = documents
    return document


def test_every_named_template_is_tested() -> None:
    assert template_names() == sorted(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_a_named_template_asks_and_ends_as_its_family_does(name: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": NEEDED.get(name, [])})
    chat = ChatFormat.of(tokenizer, name)
    document = encoded(chat, TALK)
    first, last = ([int(bound) for bound in span] for span in document.spans)
    between, answer = RENDERED[name]
    assert chat.name == name
    assert tokenizer.decode(document.input_ids[first[1] : last[0]]) == between
    assert tokenizer.decode(document.input_ids[last[0] : last[1]]) == answer
    assert document.input_ids[: last[0]].tolist() == chat.prompt_ids(TALK[:3])


@pytest.mark.parametrize("name", sorted(RENDERED.keys() - {"raw"}))
def test_a_named_template_puts_the_system_turn_first(name: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": NEEDED.get(name, [])})
    text = ChatFormat.of(tokenizer, name).prompt((Message("system", "Be kind."), *TALK[:3]))
    assert text.count("Be kind.") == 1 and text.index("Be kind.") < text.index("Hi")


@pytest.mark.parametrize("generation", [False, True])
def test_plain_renders_as_it_always_did(tokenizer: Any, generation: bool) -> None:
    turns = [{"role": "system", "content": " Be\nkind. "}]
    turns += [{"role": message.role, "content": message.content} for message in TALK]
    plain = Template(ChatFormat.of(tokenizer).template, {"eos_token": "<|end|>"})
    old = Template(OLD_PLAIN, {"eos_token": "<|end|>"})
    assert plain.render(turns, prompt=generation) == old.render(turns, prompt=generation)


def test_a_template_that_needs_tokens_is_refused_to_a_tokenizer_without_them(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.chat_template gemma: .* no token <start_of_turn> <end_of_turn>"):
        ChatFormat.of(tokenizer, "gemma")


def test_an_unknown_template_is_told_with_the_names_there_are(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data.chat_template chatmi: no such file; .*alpaca, chatml, .*zephyr$"):
        ChatFormat.of(tokenizer, "chatmi")


def test_a_template_of_the_users_own(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
    chat = ChatFormat.of(tokenizer, str(path))
    assert chat.name == str(path)
    assert chat.prompt(TALK[:1]) == "user: Hi<|end|>\n"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"own.jinja: .*utf-8"):
        ChatFormat.of(tokenizer, str(path))


def test_a_broken_template_is_one_line_with_its_line(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"^data.chat_template .*own.jinja, line 2: .*mend the template$"):
        ChatFormat.of(make_tokenizer(), str(path))
    with pytest.raises(ModelError, match=r"its chat template, line 2: .*name a data.chat_template$"):
        ChatFormat.of(make_tokenizer(path.read_text()))


def test_a_tokenizer_with_several_templates(make_tokenizer: MakeTokenizer) -> None:
    default = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    made = make_tokenizer()
    made.chat_template = {"default": default, "tool_use": "{{ tools | tojson }}" + default}
    chat = ChatFormat.of(made)
    tools = ({"name": "add"},)
    assert chat.name == "model"
    assert chat.prompt(TALK[:1]) == "Hi<|end|>"
    assert chat.prompt(TALK[:1], tools) == '[{"name": "add"}]Hi<|end|>'
    assert chat.prompt(TALK[:1], tools) == made.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tools=list(tools), tokenize=False
    )


BLOCKS = """{%- macro header(role) -%}<|im_start|>{{ role }}\n{% endmacro -%}
{%- macro answer(m) -%}{{ header('assistant') }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ answer(m) }}{%- else -%}{{ header(m.role) }}{{ m.content }}{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ header('assistant') }}{%- endif -%}"""


def test_a_block_without_the_end_of_its_turn_gets_it(make_tokenizer: MakeTokenizer) -> None:
    made = make_tokenizer(BLOCKS)
    document = encoded(ChatFormat.of(made), TALK)
    taught = [made.decode(document.input_ids[start:end]) for start, end in document.spans]
    assert taught == ["Hello there.<|im_end|>", "The sky is blue.<|im_end|>"]


def test_a_block_in_a_macro_is_found_where_transformers_miscounts(make_tokenizer: MakeTokenizer) -> None:
    made = make_tokenizer(BLOCKS)
    turns = [{"role": message.role, "content": message.content} for message in TALK]
    text, blocks = Template(BLOCKS, {}).render_blocks(turns)
    assert [text[start:end] for start, end in blocks] == ["Hello there.", "The sky is blue."]
    assert text == made.apply_chat_template(turns, tokenize=False)
    theirs = made.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, learnt in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if learnt]
    assert made.decode(masked) != "Hello there.The sky is blue."


def test_blocks_that_the_template_changes_afterwards_are_refused() -> None:
    changed = (
        "{% set said %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}{{ said | trim }}"
    )
    with pytest.raises(Refusal, match="changes what its generation blocks have rendered"):
        Template(changed, {}).render_blocks([{"role": "user", "content": "Hi"}])


def test_a_worker_imports_neither_torch_nor_the_tokenizer_classes(chatml: Any, tmp_path: Path) -> None:
    import pickle

    chat = ChatFormat.of(chatml)
    assert encoded(chat, TALK).supervised  # what was built for it is not sent along
    (tmp_path / "chat").write_bytes(pickle.dumps(chat))
    code = (
        "import json, pickle, sys; from bigtune.data.conversation import *\n"
        f"chat = pickle.load(open({str(tmp_path / 'chat')!r}, 'rb'))\n"
        "turns = Message('user', 'Hi'), Message('assistant', 'Hello there.')\n"
        "[[document]] = chat.encode([Conversation(turns, 'a', 1)])\n"
        "heavy = [name for name in sys.modules if name in ('torch', 'transformers.tokenization_utils_base')]\n"
        "print(json.dumps([document.input_ids.tolist(), heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ids, heavy = json.loads(done.stdout)
    assert heavy == []
    assert ids == encoded(chat, TALK[:2]).input_ids.tolist()
