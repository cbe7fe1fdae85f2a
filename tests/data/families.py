"""Chat templates of well-known model families: what they render is theirs, how they are written here is not.

Each was written from its published form and renders the same text for the turns that the tests give it.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_level_bpe

CORPUS = [
    "user assistant system model tool ipython think no_think answer question",
    "Be kind. Two plus two? It is four. And three plus three? It is six. The sky is blue.",
    "I add two and two. I add three and three.",
    "[INST] <<SYS>>\nYou are helpful.\n<</SYS>>\n\n [/INST] User: Assistant: USER: ASSISTANT:",
    '{"name": "add", "arguments": {"a": 2, "b": 2}}\n<tool_call>\n</tool_call>',
    "### Instruction:\nWhat is it?\n\n### Response:\nThat.",
]


@dataclass(frozen=True)
class Family:
    """A template with the tokens that its tokenizer knows: `special`, and `added` ones that are not special."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    spaces: bool = False  # words begin with a marked space, as in SentencePiece; otherwise text is cut into bytes
    pattern: str = ""  # what divides words, where it is not GPT 2's


def build(family: Family, template: str | None = "own", first: bool = False) -> Any:
    """A tokenizer of the family, trained on a few lines; `first` marks a space before the text's first word only."""
    core = _spaced(family, first) if family.spaces else byte_level_bpe(CORPUS * 8, 600, family.special)
    if family.pattern:
        words = pre_tokenizers.Split(Regex(family.pattern), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.add_tokens(list(family.added))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=family.eos,
        bos_token=family.bos,
        additional_special_tokens=[token for token in family.special if token not in (family.eos, family.bos)],
    )
    made.chat_template = family.template if template == "own" else template
    return made


def _spaced(family: Family, first: bool) -> Tokenizer:
    """As Llama 2's: byte pairs of words that begin with a marked space; other characters fall back to bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *letters], show_progress=False)
    core.train_from_iterator(CORPUS * 8, trainer)
    model = core.model
    core = Tokenizer(model)
    if first:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", *family.special])
    return core


ALTERNATE = "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"

QWEN_TOOLS = r"""
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}{{- "\n" + (tool | tojson) }}{%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within " }}
    {{- "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": " }}
    {{- "<args-json-object>}\n</tool_call><|im_end|>\n" }}
"""

QWEN_TOOL_TURN = r"""
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- "<|im_start|>user" }}{%- endif %}
        {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "<|im_end|>\n" }}{%- endif %}
"""

QWEN2_5 = (
    r"""
{%- set own = messages[0].role == "system" %}
{%- set opening = messages[0].content if own
    else "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." %}
{{- "<|im_start|>system\n" + opening }}
{%- if tools %}
    {{- "\n\n" }}"""
    + QWEN_TOOLS
    + r"""
{%- else %}{{- "<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}"""
    + QWEN_TOOL_TURN
    + r"""
    {%- elif message.role == "assistant" and message.tool_calls %}
        {{- "<|im_start|>assistant" }}
        {%- if message.content %}{{- "\n" + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}
            {{- "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- elif message.role != "system" or not loop.first %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}"""
)

QWEN3 = (
    r"""
{%- if tools %}
    {{- "<|im_start|>system\n" }}
    {%- if messages[0].role == "system" %}{{- messages[0].content + "\n\n" }}{%- endif %}"""
    + QWEN_TOOLS
    + r"""
{%- elif messages[0].role == "system" %}
    {{- "<|im_start|>system\n" + messages[0].content + "<|im_end|>\n" }}
{%- endif %}
{%- set asked = namespace(open=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set result = message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>") %}
    {%- if asked.open and message.role == "user" and not result %}
        {%- set asked.open = false %}
        {%- set asked.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" %}
        {%- set thought = "" %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif "</think>" in content %}
            {%- set thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\n" }}
        {%- if loop.index0 > asked.last and (loop.last or thought) %}
            {{- "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- "\n" }}{%- endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- elif message.role == "tool" %}"""
    + QWEN_TOOL_TURN
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\n\n</think>\n\n" }}{%- endif %}
{%- endif %}"""
)

LLAMA2 = (
    r"""
{%- set own = messages[0].role == "system" %}
{%- for message in (messages[1:] if own else messages) %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}"""
    + ALTERNATE
    + r"""{%- endif %}
    {%- set content = message.content %}
    {%- if own and loop.first %}
        {%- set content = "<<SYS>>\n" + messages[0].content + "\n<</SYS>>\n\n" + content %}
    {%- endif %}
    {%- if message.role == "user" %}{{- bos_token + "[INST] " + content.strip() + " [/INST]" }}
    {%- else %}{{- " " + content.strip() + " " + eos_token }}
    {%- endif %}
{%- endfor %}"""
)

LLAMA3_1 = r"""
{{- bos_token }}
{%- set date = date_string if date_string is defined else "26 Jul 2024" %}
{%- set own = messages[0].role == "system" %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n" }}
{{- (messages[0].content | trim if own else "") + "<|eot_id|>" }}
{%- set rest = messages[1:] if own else messages %}
{%- if tools %}
    {%- if not rest %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- "<|start_header_id|>user<|end_header_id|>\n\n" }}
    {{- "Given the following functions, please respond with a JSON for a function call " }}
    {{- "with its proper arguments that best answers the given prompt.\n\n" }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\n\n" }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) + "\n\n" }}{%- endfor %}
    {{- (rest[0].content | trim) + "<|eot_id|>" }}
    {%- set rest = rest[1:] %}
{%- endif %}
{%- for message in rest %}
    {%- if "tool_calls" in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}<|eot_id|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + (message.content | tojson) + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n" + message.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{%- endif %}"""

# Puts the system turn into the last turn, if that is a question: so not while an answer follows.
MISTRAL_V0_3 = (
    r"""
{{- bos_token }}
{%- set own = messages[0].role == "system" %}
{%- set rest = messages[1:] if own else messages %}
{%- set questions = rest | selectattr("role", "equalto", "user") | list %}
{%- set spoken = namespace(turns=0) %}
{%- for message in rest if message.role != "tool" and not message.tool_calls %}
    {%- if (message.role == "user") != (spoken.turns % 2 == 0) %}"""
    + ALTERNATE
    + r"""{%- endif %}
    {%- set spoken.turns = spoken.turns + 1 %}
{%- endfor %}
{%- for message in rest %}
    {%- if message.role == "user" %}
        {%- if tools and message == questions[-1] %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + (messages[0].content + "\n\n" if own and loop.last else "") + message.content + "[/INST]" }}
    {%- elif message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ("]" if loop.last else ", ") }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content | trim + eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
)

GEMMA2 = (
    r"""
{{- bos_token }}
{%- if messages[0].role == "system" %}{{ raise_exception("System role not supported") }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}"""
    + ALTERNATE
    + r"""{%- endif %}
    {%- set role = "model" if message.role == "assistant" else message.role %}
    {{- "<start_of_turn>" + role + "\n" + message.content | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\n" }}{%- endif %}"""
)

GEMMA3 = (
    r"""
{{- bos_token }}
{%- set own = messages[0].role == "system" %}
{%- for message in (messages[1:] if own else messages) %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}"""
    + ALTERNATE
    + r"""{%- endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\n" }}
    {{- messages[0].content + "\n\n" if own and loop.first else "" }}
    {{- message.content | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\n" }}{%- endif %}"""
)

# Ends a conversation, not a turn, with the end-of-text token.
PHI3 = r"""
{%- for message in messages if message.role in ["system", "user", "assistant"] %}
    {{- "<|" + message.role + "|>\n" + message.content + "<|end|>\n" }}
{%- endfor %}
{{- "<|assistant|>\n" if add_generation_prompt else eos_token }}"""

PHI4 = r"""
{%- for message in messages if message.role in ["system", "user", "assistant"] %}
    {{- "<|im_start|>" + message.role + "<|im_sep|>" + message.content + "<|im_end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant<|im_sep|>" }}{%- endif %}"""

DEEPSEEK_V2 = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- "User: " + message.content + "\n\n" }}
    {%- elif message.role == "assistant" %}{{- "Assistant: " + message.content + eos_token }}
    {%- else %}{{- message.content + "\n\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "Assistant:" }}{%- endif %}"""

# Drops the reasoning of every answer, while its prompt asks for reasoning.
DEEPSEEK_R1 = r"""
{%- set told = namespace(system="", tool=false, first=true) %}
{%- for message in messages if message.role == "system" %}{%- set told.system = message.content %}{%- endfor %}
{{- bos_token + told.system }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set told.tool = false %}
        {{- "<｜User｜>" + message.content }}
    {%- elif message.role == "assistant" and told.tool %}
        {%- set told.tool = false %}
        {{- "<｜tool▁outputs▁end｜>" + message.content + "<｜end▁of▁sentence｜>" }}
    {%- elif message.role == "assistant" %}
        {{- "<｜Assistant｜>" + message.content.split("</think>")[-1] + "<｜end▁of▁sentence｜>" }}
    {%- elif message.role == "tool" %}
        {%- set told.tool = true %}
        {{- "<｜tool▁outputs▁begin｜>" if told.first else "\n" }}
        {%- set told.first = false %}
        {{- "<｜tool▁output▁begin｜>" + message.content + "<｜tool▁output▁end｜>" }}
    {%- endif %}
{%- endfor %}
{%- if told.tool %}{{- "<｜tool▁outputs▁end｜>" }}
{%- elif add_generation_prompt %}{{- "<｜Assistant｜><think>\n" }}
{%- endif %}"""

ZEPHYR = r"""{% for message in messages %}
{{ '<|' + message.role + '|>\n' + message.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Writes a line end between turns, not after the last.
OLMO2 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- "<|" + message.role + "|>\n" + message.content + (eos_token if message.role == "assistant" else "") }}
    {%- if message.role != "assistant" or not loop.last %}{{- "\n" }}{%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- "<|assistant|>\n" }}{%- endif %}
{%- endfor %}"""

GRANITE3 = r"""
{%- if tools %}
    {{- "<|start_of_role|>available_tools<|end_of_role|>\n" }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) + ("" if loop.last else "\n\n") }}{%- endfor %}
    {{- "<|end_of_text|>\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|start_of_role|>" + message.role + "<|end_of_role|>" + message.content + "<|end_of_text|>\n" }}
    {%- if loop.last and add_generation_prompt %}{{- "<|start_of_role|>assistant<|end_of_role|>" }}{%- endif %}
{%- endfor %}"""

# Its generation blocks hold the header of a turn and the line end after it.
SMOLLM3 = r"""
{%- set system = messages[0].content if messages[0].role == "system" else "" %}
{%- set thinking = not ("/no_think" in system or (enable_thinking is defined and not enable_thinking)) %}
{%- set own = system.replace("/no_think", "").replace("/think", "").rstrip() %}
{{- "<|im_start|>system\n" }}
{%- if "/system_override" in system %}
    {{- own.replace("/system_override", "").rstrip() + "<|im_end|>\n" }}
{%- else %}
    {{- "## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: " + strftime_now("%d %B %Y") + "\n" }}
    {{- "Reasoning Mode: " + ("/think" if thinking else "/no_think") + "\n\n## Custom Instructions\n\n" }}
    {{- (own or "You are a helpful AI assistant named SmolLM, trained by Hugging Face.") + "\n\n" }}
    {{- "## Tools\n\n### XML Tools\n\n" + (tools | tojson if tools else "None") + "\n\n" }}
    {{- "### Python Tools\n\nNone\n\n<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- "<|im_start|>user\n" + message.content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" %}
        {%- generation %}
            {{- "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n") }}
            {{- message.content.lstrip("\n") + "<|im_end|>\n" }}
        {%- endgeneration %}
    {%- elif message.role == "tool" %}
        {{- "<|im_start|>user\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n") }}
{%- endif %}"""

COMMAND_R = (
    r"""
{{- bos_token }}
{%- set own = messages[0].role == "system" %}
{%- if own %}
    {{- "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>" + messages[0].content + "<|END_OF_TURN_TOKEN|>" }}
{%- endif %}
{%- for message in (messages[1:] if own else messages) %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}"""
    + ALTERNATE
    + r"""{%- endif %}
    {{- "<|START_OF_TURN_TOKEN|>" + ("<|USER_TOKEN|>" if message.role == "user" else "<|CHATBOT_TOKEN|>") }}
    {{- message.content.strip() + "<|END_OF_TURN_TOKEN|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" }}{%- endif %}"""
)

# Line ends are a word of their own, whatever follows: these prompts end with two.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
COMMAND_TOKENS = (
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
)  # fmt: skip
DEEPSEEK_ADDED = (
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
PHI4_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
GRANITE_TOKENS = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
OLMO_EOS = "<|endoftext|>"

FAMILIES = {
    "qwen2.5": Family(QWEN2_5, QWEN_TOKENS, "<|im_end|>", added=QWEN_ADDED),
    "qwen2.5-base": Family(QWEN2_5, QWEN_TOKENS, "<|endoftext|>", added=QWEN_ADDED),
    "qwen3": Family(QWEN3, QWEN_TOKENS, "<|im_end|>", added=QWEN_ADDED),
    "llama2": Family(LLAMA2, ("<s>", "</s>"), "</s>", "<s>", spaces=True),
    "llama3.1": Family(LLAMA3_1, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>", pattern=LLAMA3_PATTERN),
    "mistral-v0.3": Family(MISTRAL_V0_3, MISTRAL_TOKENS, "</s>", "<s>", spaces=True),
    "gemma2": Family(GEMMA2, GEMMA_TOKENS, "<eos>", "<bos>"),
    "gemma3": Family(GEMMA3, GEMMA_TOKENS, "<eos>", "<bos>"),
    "phi3": Family(PHI3, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>"),
    "phi4": Family(PHI4, PHI4_TOKENS, "<|endoftext|>"),
    "deepseek-v2": Family(DEEPSEEK_V2, (DEEPSEEK_BOS, DEEPSEEK_EOS), DEEPSEEK_EOS, DEEPSEEK_BOS),
    "deepseek-r1": Family(DEEPSEEK_R1, (DEEPSEEK_BOS, DEEPSEEK_EOS), DEEPSEEK_EOS, DEEPSEEK_BOS, DEEPSEEK_ADDED),
    "zephyr": Family(ZEPHYR, ("<s>", "</s>"), "</s>", "<s>", spaces=True),
    "olmo2": Family(OLMO2, (OLMO_EOS,), OLMO_EOS, OLMO_EOS),
    "granite3": Family(GRANITE3, GRANITE_TOKENS, "<|end_of_text|>", "<|end_of_text|>"),
    "smollm3": Family(SMOLLM3, QWEN_TOKENS, "<|im_end|>", added=QWEN_ADDED),
    "command-r": Family(COMMAND_R, COMMAND_TOKENS, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
}
