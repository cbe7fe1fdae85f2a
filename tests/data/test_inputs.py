"""A fingerprint sees everything that documents are made from, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Data, Source, TrainingSource
from bigtune.data import live
from bigtune.data.inputs import inputs_of
from bigtune.data.live import LiveRows
from bigtune.data.recipe import Recipe
from tests.data.conftest import CHATML

ROWS = "".join(
    json.dumps({"question": f"Number {i}?", "answer": f"It is {i}.", "other": "x"}) + "\n" for i in range(40)
)
HELD_OUT = json.dumps({"question": "Does the fox see the dog in the wood?", "answer": "It does.", "other": "y"}) + "\n"


class Setting:
    """A run's data in a folder of its own, to be changed one thing at a time."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.model = folder, folder / "model"
        self.rows, self.held_out = folder / "rows.jsonl", folder / "held.jsonl"
        self.rows.write_text(ROWS)
        self.held_out.write_text(HELD_OUT)
        self.template = folder / "chat.jinja"
        self.template.write_text(CHATML)
        tokenizer.save_pretrained(self.model)
        self.source: dict[str, Any] = {"path": self.rows}
        self.held_source: dict[str, Any] = {"path": self.held_out}
        self.data: dict[str, Any] = {"chat_template": str(self.template), "clean": {"decontaminate": 5}}

    def fingerprints(self) -> tuple[str, str]:
        """Of a store, and of a stream."""
        held_out = (Source(**self.held_source),)
        data = Data(sources=(TrainingSource(**self.source),), **{"sequence_length": 64, **self.data})
        store = inputs_of(data, self.model, held_out, None).fingerprint
        rows = LiveRows(data, Recipe.of(data, self.model, held_out), seed=0)
        rows.close()
        return store, rows.fingerprint


@pytest.fixture
def setting(tmp_path: Path, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(live, "open_pool", _no_pool)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Setting(tmp_path, make_tokenizer())


class _no_pool:
    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


def _edit(name: str, **values: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        path = setting.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _own(setting: Setting) -> None:
    setting.data.pop("chat_template")
    (setting.model / "chat_template.jinja").write_text(CHATML + " ")


CHANGES: dict[str, Callable[[Setting], Any]] = {
    "a row": lambda s: s.rows.write_text(ROWS.replace("Number 20?", "Number 21?")),
    "a row more": lambda s: s.rows.write_text(ROWS + ROWS[:40] + '"}\n'),
    "fields": lambda s: s.source.update(fields={"answer": "other"}),
    "roles": lambda s: s.source.update(roles={"narrator": "user"}),
    "the template": lambda s: s.template.write_text(CHATML + " "),
    "supervise": lambda s: s.data.update(supervise="last"),
    "special tokens": lambda s: s.data.update(special_tokens="parse"),
    "cleaning": lambda s: s.data.update(clean={"decontaminate": 5, "min_tokens": 3}),
    "n-grams": lambda s: s.data.update(clean={"decontaminate": 6}),
    "a held-out row": lambda s: s.held_out.write_text(HELD_OUT.replace("fox", "cat")),
    "fields of held-out rows": lambda s: s.held_source.update(fields={"question": "answer", "answer": "other"}),
    "eos_token": _edit("tokenizer_config.json", eos_token="<|pad|>"),
    "the vocabulary": lambda s: (s.model / "tokenizer.json").write_text(
        (s.model / "tokenizer.json").read_text().replace("<|im_start|>", "<|im_begin|>")
    ),
    "its own template": _own,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_documents_are_made_from_changes_both_fingerprints(setting: Setting, change: str) -> None:
    before = setting.fingerprints()
    CHANGES[change](setting)
    after = setting.fingerprints()
    assert before[0] != after[0] and before[1] != after[1]


def test_a_template_for_tools_beside_the_model_counts_too(setting: Setting) -> None:
    _own(setting)
    before = setting.fingerprints()
    (setting.model / "additional_chat_templates").mkdir()
    (setting.model / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML + "{{ tools }}")
    after = setting.fingerprints()
    assert before[0] != after[0] and before[1] != after[1]


def test_a_template_in_the_home_folder_is_read(setting: Setting) -> None:
    setting.data["chat_template"] = "~/chat.jinja"
    before = setting.fingerprints()
    setting.template.write_text(CHATML + " ")
    after = setting.fingerprints()
    assert before[0] != after[0] and before[1] != after[1]


SAME: dict[str, Callable[[Setting], Any]] = {
    "nothing": lambda s: None,
    "the file's place": lambda s: s.source.update(path=shutil.copy(s.rows, s.folder / "copy.jsonl")),
    "workers": lambda s: s.data.update(workers=3),
    "what is refused": lambda s: s.data.update(min_supervised=0.5, on_bad_row="skip"),
    "where documents lie": lambda s: s.data.update(store=s.folder / "elsewhere"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_document_changes_no_fingerprint(setting: Setting, change: str) -> None:
    before = setting.fingerprints()
    SAME[change](setting)
    if "path" in setting.source:
        setting.source["path"] = Path(setting.source["path"])
    assert setting.fingerprints() == before


@pytest.mark.parametrize("change", [{"sequence_length": 32}, {"on_long_document": "split"}])
def test_packing_is_of_the_stream_but_not_of_the_store(setting: Setting, change: dict[str, Any]) -> None:
    before = setting.fingerprints()
    setting.data.update(change)
    after = setting.fingerprints()
    assert before[0] == after[0] and before[1] != after[1]


def test_how_windows_are_cut_is_of_the_stream(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    before = setting.fingerprints()
    for name in ("BLOCK_BYTES", "WINDOW_BYTES", "LARGE", "SHARDS", "WINDOWS_A_SHARD", "OPEN_FILES"):
        with monkeypatch.context() as patch:
            patch.setattr(live, name, getattr(live, name) * 2)
            assert setting.fingerprints()[1] != before[1], name
