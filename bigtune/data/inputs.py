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

from bigtune.config import Data, Source
from bigtune.data.features import feature_identity
from bigtune.data.sources import SourceFile, UnreadableFile, hash_of, resolve_sources, stat_of
from bigtune.data.store import VERSION, Manifest
from bigtune.data.template import DEFAULT_TEMPLATE, TEMPLATES
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
    tokenizer = [
        f"{name} {_hash_file(model_path / name)}" for name in TOKENIZER_INPUTS if (model_path / name).is_file()
    ]
    facts: list[Any] = [f"store {VERSION}", *tokenizer, _template(data.chat_template)]
    facts += [data.supervise, data.special_tokens, feature_identity(data.clean, None)]
    if data.clean.decontaminate:
        facts.append(data.holdout)
        facts += [*(hash_of(file) for file in resolve_sources(held_out)[0])]
        facts += [file.hash for file in hashed] if data.holdout else []
    recipe = _hash(facts)
    keys = [part_key(file, data, recipe) if file.hash else file.file.path for file in hashed]
    sources = [file.file.source for file in hashed]
    fingerprint = _hash([recipe, keys, sources, data.clean.model_dump(mode="json"), data.holdout])
    return Inputs(hashed, tuple(ignored), recipe, fingerprint)


def _template(choice: str | None) -> list[str]:
    """What the run file says of the template, as text; whether that is a template is seen when it is used."""
    if choice is None:
        return ["model", DEFAULT_TEMPLATE]
    named = [path for path in (TEMPLATES / f"{choice}.jinja", Path(choice)) if path.is_file()]
    return [choice, named[0].read_text(encoding="utf-8", errors="replace") if named else ""]


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
    source = data.sources[file.file.source]
    return _hash([recipe, file.hash, file.file.kind, file.chunk_bytes, source.fields, source.roles])[:16]


def _hash(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
