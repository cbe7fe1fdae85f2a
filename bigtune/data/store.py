"""The document store: a folder with `documents.arrow` (an Arrow IPC stream) and `manifest.json`.

The manifest is written last and removed first, so that a store without one is no store: a writer that is
killed leaves nothing that looks whole. `datasets.Dataset.from_file` reads the Arrow file as well.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bigtune.data.chat import Encoded
from bigtune.data.conversation import Conversation
from bigtune.errors import DataError

VERSION = 1  # of the files; part of the fingerprint
DOCUMENTS, MANIFEST = "documents.arrow", "manifest.json"

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),  # flattened pairs
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from. Counts of rows and documents are by reason."""

    fingerprint: str  # of the documents: equal fingerprints, equal documents
    inputs: str  # hash of everything that they were made from, but for the sequence length
    sequence_length: int
    rows: int
    documents: int
    conversations: int  # documents that the chat template was used for; the others are raw text
    tokens: int
    supervised_tokens: int
    longest_tokens: int  # before dropping and truncating
    truncated: int
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    highest_token: int = 0
    template: str = "model"  # model: the tokenizer's own; default: bigtune's
    arrow_bytes: int = 0
    version: int = VERSION

    def summary(self) -> str:
        """One line, and a second one if something was left out or cut."""
        share = self.supervised_tokens / max(self.tokens, 1)
        line = (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {share:.1%} supervised"
            f" (longest {self.longest_tokens:,})"
        )
        if self.template == "default" and self.conversations:
            line += "; the model has no chat template: bigtune's plain one is used"
        losses = [f"dropped {count:,} ({reason})" for reason, count in self.dropped.items()]
        if self.truncated:
            losses.append(f"truncated {self.truncated:,} to {self.sequence_length:,} tokens")
        losses += [f"skipped {count:,} rows ({reason})" for reason, count in self.skipped.items()]
        return "\n".join([line, "; ".join(losses)]) if losses else line


class StoreWriter:
    """Writes a store aside, under `path`; `finish` makes it the store, leaving without it makes nothing.

    with StoreWriter(path) as writer:
        writer.add(documents, conversations)
        writer.finish(manifest)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._aside, self._manifest_aside = path / f"{DOCUMENTS}.tmp", path / f"{MANIFEST}.tmp"

    def __enter__(self) -> Self:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(self._aside), "wb")
        self._stream = pa.ipc.new_stream(self._sink, SCHEMA)
        return self

    def add(self, documents: Sequence[Encoded], conversations: Sequence[Conversation]) -> None:
        """Append documents and, each beside its own, the rows that they came from."""
        columns = [
            _lists([document.input_ids for document in documents]),
            _lists([document.spans.reshape(-1) for document in documents]),
            pa.array([str(conversation.path) for conversation in conversations], pa.string()),
            pa.array([conversation.row for conversation in conversations], pa.int64()),
        ]
        with writing(self.path):
            self._stream.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def finish(self, manifest: Manifest) -> Manifest:
        """Make what was written the store. Returns the manifest with the size of the file."""
        with writing(self.path):
            self._stream.close()
            self._sink.close()
            manifest = dataclasses.replace(manifest, arrow_bytes=self._aside.stat().st_size)
            text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n"
            self._manifest_aside.write_text(text, encoding="utf-8")
            for aside in (self._aside, self._manifest_aside):
                _sync(aside)
            (self.path / MANIFEST).unlink(missing_ok=True)
            self._aside.replace(self.path / DOCUMENTS)
            self._manifest_aside.replace(self.path / MANIFEST)
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what it could not write is an error already
            self._sink.close()
        for aside in (self._aside, self._manifest_aside):
            aside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line why a store cannot be written at `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # Arrow's own text has the line of its source
        raise DataError(f"{path}: the document store cannot be written here ({reason}); set data.store") from None


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> Any:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`.

    Raises:
        DataError: there is no store, it is not whole, or another version of bigtune wrote it.
    """
    again = "run `bigtune prepare RUN.yaml`"
    try:
        tree = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        size = (path / DOCUMENTS).stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path.absolute()}: no prepared documents here; {again}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the document store cannot be read ({error}); {again}") from None
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        raise DataError(f"{path}: the document store is of another version of bigtune; {again}")
    try:
        manifest = Manifest(**tree)
    except TypeError:
        raise DataError(f"{path / MANIFEST}: not a manifest of bigtune's; {again}") from None
    if manifest.arrow_bytes != size:
        raise DataError(f"{path / DOCUMENTS}: {size:,} bytes, where the manifest has {manifest.arrow_bytes:,}; {again}")
    return manifest


@dataclass(frozen=True, slots=True)
class Document:
    """`input_ids` int32 [n] and `spans` int32 [k, 2], read-only views of the mapped file."""

    input_ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]


class Store:
    """Prepared documents, memory-mapped: opening reads no tokens."""

    def __init__(self, path: Path, manifest: Manifest, table: Any) -> None:
        self.path, self.manifest = path, manifest
        self._ids = _Column(table.column("input_ids"))
        self._spans = _Column(table.column("spans"))
        self._table = table

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open the store at `path`.

        Raises:
            DataError: it is missing or broken; the message says to prepare it.
        """
        manifest = read_manifest(path)
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path / DOCUMENTS))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).split("\n")[0]
            raise DataError(f"{path / DOCUMENTS}: cannot be read ({reason}); run `bigtune prepare RUN.yaml`") from None
        if table.schema != SCHEMA or len(table) != manifest.documents:
            raise DataError(f"{path / DOCUMENTS}: does not fit its manifest; run `bigtune prepare RUN.yaml`")
        return cls(path, manifest, table)

    def __len__(self) -> int:
        return self.manifest.documents

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [N]; reads the offsets alone."""
        return self._ids.lengths()

    def document(self, i: int) -> Document:
        return Document(self._ids[i], self._spans[i].reshape(-1, 2))

    def where(self, i: int) -> str:
        """The file and row that document `i` came from, for a message."""
        return f"{self._table.column('source')[i]}, row {self._table.column('row')[i]}"


class _Column:
    """A chunked Arrow column of int32 lists as NumPy views."""

    def __init__(self, column: Any) -> None:
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def lengths(self) -> npt.NDArray[np.int32]:
        parts = [np.diff(offsets) for offsets in self._offsets]
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)

    def __getitem__(self, i: int) -> npt.NDArray[np.int32]:
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"document {i} of {self._starts[-1]}")
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        start, end = self._offsets[chunk][i - self._starts[chunk] :][:2]
        values: npt.NDArray[np.int32] = self._values[chunk][start:end]
        return values
