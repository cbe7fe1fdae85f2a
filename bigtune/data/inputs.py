"""What the documents are made from, as fingerprints: files by content, the tokenizer's own files, template, options.

A part of the store is named by what it is made from, so that finished work is found again whatever else changed.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtune.config import Data, Source
from bigtune.data.features import feature_identity
from bigtune.data.manifest import VERSION, Manifest
from bigtune.data.recipe import Recipe
from bigtune.data.sources import SourceFile, UnreadableFile, hash_of, reading, resolve_sources, stat_of
from bigtune.data.template import DEFAULT_TEMPLATE, template_path
from bigtune.errors import DataError, ModelError

# Whatever of a model folder decides on the token ids.
TOKENIZER_INPUTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

CHUNK_BYTES = (2**18, 2**24)
"""Of a chunk, at least and at most; in between a 32nd of its file, so that small files keep many cores busy too."""

SAMPLES, SAMPLE_BYTES = 64, 2**14
"""Of each streamed file."""

RACY_SECONDS = 2.0
"""A file changed so shortly before it was hashed may change again within the same tick of its clock."""


@dataclass(frozen=True)
class InputFile:
    """A source file with its contents' hash; empty where it cannot be read and that is to be skipped."""

    file: SourceFile
    hash: str
    stat: list[int] | None  # size and time when it was hashed; None for what is no file
    bytes: int
    settled: bool = False  # whether the file was last changed well before it was hashed

    @property
    def lasting_stat(self) -> list[int] | None:
        """The stat, where the same one means the same contents the next time."""
        return self.stat if self.settled else None

    @property
    def chunk_bytes(self) -> int:
        low, high = CHUNK_BYTES
        return min(max(self.bytes // 32, low), high)

    def refuse_changed(self) -> None:
        """Raises DataError if the file is no longer what was hashed."""
        if self.stat is not None and stat_of(self.file) != self.stat:
            raise DataError(f"{self.file.path}: changed while it was read; run the command again when it is whole")


@dataclass(frozen=True)
class Inputs:
    """Everything that the documents are made from."""

    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]
    recipe: str  # what else decides on the parts, as a hash
    fingerprint: str


def inputs_of(data: Data, model_path: Path, held_out: Sequence[Source], before: Manifest | None) -> Inputs:
    """Hashes of contents, not of paths or times: a moved or copied file stays the same file.

    Args:
        before: of an earlier store; its files' hashes are trusted where sizes and times are the same.

    Raises:
        ModelError: there is no model folder.
        UnreadableFile: a source cannot be read, and bad rows are not to be skipped.
    """
    if not model_path.is_dir():
        raise ModelError(f"{model_path.absolute()}: no such model folder; correct model.path")
    files, ignored = resolve_sources(data.sources)
    known = {file["path"]: (file["stat"], file["hash"]) for file in before.files} if before else {}
    hashed = tuple(_hashed(file, known, data.on_bad_row == "skip") for file in files)
    facts: list[Any] = [f"store {VERSION}", _tokenizer(model_path), _template(data.chat_template)]
    facts += [data.supervise, data.special_tokens, feature_identity(data.clean, None)]
    if data.clean.decontaminate:
        facts.append(data.holdout)
        facts += [[hash_of(file), *_reading(file, held_out)] for file in resolve_sources(held_out)[0]]
        facts += [[file.hash, *_reading(file.file, data.sources)] for file in hashed] if data.holdout else []
    recipe = _hash(facts)
    keys = [part_key(file, data, recipe) if file.hash else file.file.path for file in hashed]
    sources = [file.file.source for file in hashed]
    fingerprint = _hash([recipe, keys, sources, data.clean.model_dump(mode="json"), data.holdout])
    return Inputs(hashed, tuple(ignored), recipe, fingerprint)


def stream_fingerprint(files: Sequence[SourceFile], data: Data, recipe: Recipe, cutting: Sequence[int]) -> str:
    """A hash of what streamed rows are made from, in no time on data of any size: of each file its size, its ends and
    some samples in between. `cutting` are the numbers that decide how windows are cut.

    Raises:
        UnreadableFile: a source cannot be read.
    """
    settings = data.model_dump(mode="json", include={"sequence_length", "on_long_document", "clean", "holdout"})
    facts: list[Any] = [f"stream {VERSION}", list(cutting), settings, recipe.identity]
    facts += [[file.source, file.kind, file.compression, *_sample(file)] for file in files]
    return _hash(facts)


def _sample(file: SourceFile) -> list[Any]:
    stat = stat_of(file)
    if stat is None:
        return [hash_of(file)]
    size, total = stat[0], hashlib.sha256()
    places = np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64).tolist()
    with reading(file.path), Path(file.path).open("rb") as opened:
        for place in places:
            opened.seek(place)
            total.update(opened.read(SAMPLE_BYTES))
    return [size, total.hexdigest()]


def _reading(file: SourceFile, sources: Sequence[Source]) -> list[Any]:
    """What decides how the rows of a file are read."""
    return [file.kind, sources[file.source].fields, sources[file.source].roles]


def _tokenizer(model_path: Path) -> list[str]:
    paths = [model_path / name for name in TOKENIZER_INPUTS]
    paths += sorted((model_path / "additional_chat_templates").glob("*.jinja"))
    return [f"{path.name} {_hash_file(path)}" for path in paths if path.is_file()]


def _template(choice: str | None) -> list[str]:
    """What the run file says of the template, as text; whether that is a template is seen when it is used."""
    if choice is None:
        return ["model", DEFAULT_TEMPLATE]
    path = template_path(choice)
    return [choice, path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""]


def _hashed(file: SourceFile, known: Mapping[str, tuple[Any, str]], skip: bool) -> InputFile:
    try:
        stat = stat_of(file)
        if stat is None:  # a data set by name
            return InputFile(file, hash_of(file), None, 32 * CHUNK_BYTES[1])
        if known.get(file.path, (None, ""))[0] == stat:
            return InputFile(file, known[file.path][1], stat, stat[0], settled=True)
        settled = time.time() - stat[1] / 1e9 >= RACY_SECONDS
        return InputFile(file, hash_of(file), stat, stat[0], settled)
    except UnreadableFile:
        if not skip:
            raise
        return InputFile(file, "", None, 0)


def part_key(file: InputFile, data: Data, recipe: str) -> str:
    return _hash([recipe, file.hash, file.chunk_bytes, *_reading(file.file, data.sources)])[:16]


def _hash(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
