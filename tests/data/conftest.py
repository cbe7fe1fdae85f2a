"""A tiny real tokenizer: byte-level BPE trained on a few lines, as model folders carry it."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from bigtune.data import prepare as room
from bigtune.data.parts import make_part
from tests.tiny import byte_level_bpe

CORPUS = [
    "### Instruction:\nWhat is two plus two?\n\n### Response:\nTwo plus two is four.",
    "Name a colour of the sky. The sky is blue.",
    "A list:\n\n  - one\n  - two\n\n    return 0;",
    "<<48/2=24>>24 clips in May. #### 72",
]

CHATML = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def build_tokenizer(template: str | None = None, bos: bool = False) -> Any:
    """A fast tokenizer with <|end|> as eos and <|pad|>; with <s> in front of plain text if `bos`."""
    tokenizer = byte_level_bpe(CORPUS * 4, 400, ["<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<s>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def chatml() -> Any:
    return build_tokenizer(CHATML)


@pytest.fixture(scope="session")
def model_path(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer and no chat template."""
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    return path


WriteRows = Callable[[Iterable[Mapping[str, Any]]], Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows to a JSONL file of the test's own."""

    def write(rows: Iterable[Mapping[str, Any]]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of parts, as they are made in this process."""
    made: list[str] = []
    make = make_part

    def counted(recipe: Any, chunk: Any, path: Path) -> Any:
        made.append(path.name)
        return make(recipe, chunk, path)

    monkeypatch.setattr(room, "make_part", counted)
    return made
