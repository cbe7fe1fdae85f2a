"""Rows of tests of `prepare`, and what became of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bigtune.config import Data, TrainingSource
from bigtune.data.store import REMOVED

WriteRows = Callable[[Iterable[Mapping[str, Any]]], Path]


def qa(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


SHORT = [qa("Hi", "Hello"), qa("And?", "The sky is blue.")]
LONG = qa("Hi", "four " * 200)


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [qa(f"Number {i}?", f"{i} is {i % 7} times something." * (1 + i % 3)) for i in range(start, start + count)]


def data(*paths: Path, **settings: Any) -> Data:
    sources = tuple(TrainingSource(path=path) for path in paths)
    return Data(sources=sources, sequence_length=settings.pop("sequence_length", 128), **settings)


def removed(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / REMOVED).read_text().splitlines()]


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(store: Path) -> dict[str, str]:
    """A hash of each file of a store but for the times in its manifest."""
    hashes = {}
    for path in sorted(store.rglob("*")):
        if path.is_file():
            text = path.read_bytes()
            if path.name == "manifest.json":
                tree = json.loads(text)
                for file in tree["files"]:
                    file["stat"] = None
                text = json.dumps(tree).encode()
            hashes[str(path.relative_to(store))] = hashlib.sha256(text).hexdigest()
    return hashes
