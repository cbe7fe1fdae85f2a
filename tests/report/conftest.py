"""Runs over small sources, with a real tokenizer and no weights: looking at data needs none."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Run
from bigtune.runfile import resolve
from tests.tiny import tiny_tokenizer

END = "<|end|>"
MakeRun = Callable[..., Run]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of unequal lengths, with characters of one to four bytes."""
    signs = ["red", "blåbær", "漢字かな", "🙂 and 👩‍🚀", "a longer answer of some words, and then more of them"]
    return [
        {"question": f"Number {i}?", "answer": f"{i}: {signs[i % 5]} {signs[i % 3] * (i % 4)}"}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_run(model: Path, tmp_path: Path) -> MakeRun:
    """A run over files; changes are keys of `data`, but for `train`."""

    def make(*sources: Path | Mapping[str, Any], train: Mapping[str, Any] | None = None, **data: Any) -> Run:
        listed = [{"path": str(source)} if isinstance(source, Path) else source for source in sources]
        return resolve(
            {
                "model": {"path": str(model)},
                "data": {"sources": listed, "sequence_length": 128} | data,
                "train": {"epochs": 1, "global_batch": 4} | dict(train or {}),
                "output": str(tmp_path / "run"),
            }
        )

    return make
