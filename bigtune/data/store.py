"""The document store: token ids of every document, in Arrow files that are mapped and never copied.

    data/
      manifest.json             what the store holds and what it was made from; written last, removed first
      parts/KEY-00000.arrow     one a chunk of a source file: an Arrow IPC stream of `SCHEMA` and features
      parts/KEY-00000.json      what was counted on the way; a part without it is not whole
      chosen.npy                the documents that are trained on, as positions in all parts, int64 [N]
      removed.jsonl             the rows that are not, each with its reason
      state.json, dataset_info.json   so that `datasets.load_from_disk` reads the folder as well

A part is named by everything that it was made from, so that it is made once, by whichever call gets to it.
"""

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bigtune.data.arrow import numpy_lists, numpy_numbers
from bigtune.data.document import Document
from bigtune.data.manifest import MANIFEST, Manifest, PartCounts, read_manifest
from bigtune.errors import DataError

CHOSEN, REMOVED, PARTS = "chosen.npy", "removed.jsonl", "parts"

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),  # supervised ranges, flattened pairs
        ("weights", pa.list_(pa.float32())),  # one a span
        ("supervised", pa.int32()),
        ("row", pa.int64()),
        ("part", pa.int32()),  # of the documents that one row gives, from 0
        ("content", pa.uint64()),  # hash of what the row says
        ("id", pa.uint64()),  # hash of the row's own id, 0 for none
    ]
)


LISTS = ("input_ids", "spans", "weights")
OWN = {MANIFEST, CHOSEN, REMOVED, PARTS, "state.json", "dataset_info.json", "aside.tmp"}
OWN_PARTS = re.compile(r"[0-9a-f]+-\d{5,}\.(arrow|json|\d+\.tmp)")


def refuse_foreign(path: Path) -> None:
    """Writing a store removes what is no longer of it, so there must be nothing else.

    Raises:
        DataError: the folder holds something that no store has.
    """
    with writing(path):
        for folder, is_own in ((path, OWN.__contains__), (path / PARTS, OWN_PARTS.fullmatch)):
            for entry in folder.iterdir() if folder.exists() else ():
                if not is_own(entry.name):
                    raise DataError(f"{entry}: is not of a document store; choose another folder as data.store")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line why a store cannot be written at `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # Arrow's own text has the line of its source
        raise DataError(f"{path}: the document store cannot be written here ({reason}); set data.store") from None


def write_part(path: Path, batch: pa.RecordBatch, counts: PartCounts) -> PartCounts:
    """Write a part aside, then under its name; the counts, returned with its size, come last and make it whole.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    with writing(path.parent):
        try:
            with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            counts = dataclasses.replace(counts, bytes=aside.stat().st_size)
            _into_place(aside, path.with_suffix(".arrow"))
            aside.write_text(json.dumps(dataclasses.asdict(counts)), encoding="utf-8")
            _into_place(aside, path.with_suffix(".json"))
            return counts
        finally:
            aside.unlink(missing_ok=True)


def read_part_counts(path: Path) -> PartCounts | None:
    """The counts of a whole part; None where there is none."""
    try:
        tree = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        counts = PartCounts(**{**tree, "bad": [tuple(bad) for bad in tree["bad"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return counts if _has_bytes(path.with_suffix(".arrow"), counts.bytes) else None


def is_whole(path: Path, manifest: Manifest) -> bool:
    """Whether all files that the manifest names are there, with their sizes."""
    parts = {name: size for file in manifest.files for name, size in file["parts"].items()}
    there = all(_has_bytes(path / PARTS / f"{name}.arrow", size) for name, size in parts.items())
    return there and (path / CHOSEN).is_file() and (path / REMOVED).is_file()


def _has_bytes(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def write_store(
    path: Path, manifest: Manifest, chosen: npt.NDArray[np.int64], removed: Iterable[Mapping[str, Any]]
) -> None:
    """Make the parts that the manifest names the store at `path`, and remove all others."""
    names = manifest.part_names
    state: dict[str, Any] = {
        "_data_files": [{"filename": f"{PARTS}/{name}.arrow"} for name in names],
        "_fingerprint": manifest.fingerprint[:16],
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
        "_split": None,
    }  # fmt: skip
    with writing(path):
        (path / MANIFEST).unlink(missing_ok=True)
        aside = path / "aside.tmp"
        try:
            numbers = io.BytesIO()
            np.save(numbers, chosen)  # into a file, it would say nothing of a disk that is full
            aside.write_bytes(numbers.getbuffer())
            _into_place(aside, path / CHOSEN)
            texts = {
                REMOVED: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in removed),
                "state.json": json.dumps(state, indent=1) + "\n",
                "dataset_info.json": "{}\n",
                MANIFEST: json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n",
            }
            for name, text in texts.items():
                aside.write_text(text, encoding="utf-8")
                _into_place(aside, path / name)
        finally:
            aside.unlink(missing_ok=True)
        kept = set(names)
        for file in (path / PARTS).iterdir():  # those of other sources or settings, and what a kill left
            if file.name.split(".")[0] not in kept or file.suffix == ".tmp":
                file.unlink(missing_ok=True)


def _into_place(aside: Path, path: Path) -> None:
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


class Columns:
    """The columns of some parts, mapped, as if they were one: opening reads no tokens."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises DataError if a part is missing or broken."""
        self._batches = [_map(path) for path in paths]
        self._starts = np.cumsum([0, *map(len, self._batches)])
        self._lists = [[numpy_lists(batch.column(name)) for name in LISTS] for batch in self._batches]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers as one array, [N]."""
        parts = [numpy_numbers(batch.column(name)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def chunked(self, name: str) -> Any:
        """A column as a `pa.ChunkedArray` over the parts, mapped."""
        return pa.chunked_array([batch.column(name) for batch in self._batches])

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [N]; reads the offsets alone."""
        parts = [np.diff(ids[0]) for ids, _, _ in self._lists]
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)

    def document(self, i: int) -> Document:
        """Document `i` of all."""
        part, at = self.place(i)
        ids, spans, weights = (values[offsets[at] : offsets[at + 1]] for offsets, values in self._lists[part])
        return Document(ids, spans.reshape(-1, 2), weights)

    def place(self, i: int) -> tuple[int, int]:
        """The part that document `i` is in, and where in it."""
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return part, i - int(self._starts[part])

    def parts_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which part each document is in."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def row(self, i: int) -> int:
        """The row that document `i` came from."""
        part, at = self.place(i)
        return int(self._batches[part].column("row")[at].as_py())


def _map(path: Path) -> pa.RecordBatch:
    again = "run `bigtune prepare RUN.yaml` again"
    try:
        batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()  # a part is one batch
    except (OSError, pa.ArrowInvalid, StopIteration) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: cannot be read ({reason}); {again}") from None
    if any(batch.schema.get_field_index(field.name) < 0 for field in SCHEMA):
        raise DataError(f"{path}: not a part of a document store; {again}")
    return batch


class Store:
    """The documents that are trained on."""

    def __init__(self, path: Path, manifest: Manifest, columns: Columns, chosen: npt.NDArray[np.int64]) -> None:
        self.path, self.manifest, self.columns, self.chosen = path, manifest, columns, chosen
        self._parts = [(file["source"], file["path"]) for file in manifest.files for _ in file["parts"]]

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open the store at `path`.

        Raises:
            DataError: it is missing or broken; the message says to prepare it.
        """
        manifest = read_manifest(path)
        columns = Columns([path / PARTS / f"{name}.arrow" for name in manifest.part_names])
        try:
            chosen = np.load(path / CHOSEN, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path / CHOSEN}: cannot be read ({error}); run `bigtune prepare RUN.yaml` again"
            ) from None
        if len(chosen) != manifest.documents or (len(chosen) and chosen[-1] >= len(columns)):
            raise DataError(f"{path}: its parts do not fit its manifest; run `bigtune prepare RUN.yaml` again")
        return cls(path, manifest, columns, chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [N]; reads the offsets alone."""
        return self.columns.lengths()[self.chosen]

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        """Supervised tokens of each document, int32 [N]."""
        return self.columns.numbers("supervised")[self.chosen]

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        """The content hash of each document's row, uint64 [N]."""
        return self.columns.numbers("content")[self.chosen]

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        """Which of `data.sources` each document is from, [N]."""
        of_part = np.array([source for source, _ in self._parts], dtype=np.int64)
        return of_part[self.columns.parts_of(self.chosen)]

    def document(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.columns.document(int(self.chosen[i]))

    def where(self, i: int) -> str:
        """The file and row that document `i` came from, for a message."""
        at = int(self.chosen[i])
        _, path = self._parts[self.columns.place(at)[0]]
        return f"{path}, row {self.columns.row(at)}"
