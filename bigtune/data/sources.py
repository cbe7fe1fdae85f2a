"""What a run file names under `sources` → the files to read, in a fixed order, each with its fingerprint.

Nothing here imports pyarrow or `datasets` unless a source needs it, so that a run whose data is unchanged
answers at once.
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtune.config import ROLES, Source
from bigtune.data.values import BOM
from bigtune.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
PACKED = (".gz", ".gzip", ".zst", ".zstd")
# What `datasets` keeps beside the rows.
NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
UNREADABLE = "unreadable file"
"""What such files are counted under, where they are skipped."""

SNIFFED = 1 << 16  # bytes in which the first character of JSON is looked for

# Keys that a source's `fields` can name, of rows and of single turns.
ROW_KEYS = (
    *("messages", "conversations", "instruction", "input", "output", "response", "instances", "question"),
    *("answer", "prompt", "completion", "text", "system", "history", "tools", "task", "tags", "id"),
)
TURN_KEYS = (
    *("role", "content", "from", "value", "train", "weight", "name", "tool_calls", "tool_call_id"),
    *("function_call", "reasoning_content", "thinking"),
)


class UnreadableFile(DataError):
    """A file that is there, but is damaged, cut off, forbidden, or not what its name says."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, or a data set by name."""

    source: int  # index in the sources
    path: str  # of the file, as the run file has it, or "dataset NAME (config, split)"
    kind: str  # jsonl, json (one array), csv, tsv, parquet, arrow, text, dataset
    compression: str | None = None  # gzip or zstd
    dataset: str = ""
    config: str | None = None
    split: str | None = None


def resolve_sources(sources: Sequence[Source]) -> tuple[list[SourceFile], list[str]]:
    """The files of all sources, in the sources' order and sorted within a glob or folder; and what was passed over.

    A folder gives its files of known extensions, with those of its folders, but nothing hidden; a glob gives
    every file that it matches, and folders that it matches like folders that are named. A file that cannot be
    opened is among them: reading it says why.

    Raises:
        DataError: there is no such file, a glob or folder holds nothing to read, a split is unknown, a data set
            is not to be had, or `fields` or `roles` name what bigtune does not know.
    """
    files: list[SourceFile] = []
    ignored: list[str] = []
    for index, source in enumerate(sources):
        _check_names(source)
        if source.dataset is not None:
            from bigtune.data.hub import split_of

            split = split_of(source.dataset, source.config, source.split)
            where = f"dataset {source.dataset} ({', '.join(filter(None, (source.config, split)))})"
            files.append(SourceFile(index, where, "dataset", None, source.dataset, source.config, split))
            continue
        found = _Found(source.split)
        with reading(str(source.path)):
            found.add(str(source.path))
        ignored += found.ignored
        if not found.paths:
            beside = f" ({len(found.ignored)} of other kinds)" if found.ignored else ""
            raise DataError(f"{source.path}: no file to read here{beside}; known are {', '.join(KINDS)}")
        if source.split is not None and not found.split_used:
            raise DataError(f"{source.path}: no data set of `save_to_disk`, so it has no split; leave split out")
        files += [_identify(index, path) for path in found.paths]
    return files, ignored


def stat_of(file: SourceFile) -> list[int] | None:
    """Size in bytes and time of change in nanoseconds: equal as long as no one writes. None for data sets.

    Raises:
        UnreadableFile: the file cannot be asked.
    """
    if file.kind == "dataset":
        return None
    with reading(file.path):
        found = Path(file.path).stat()
        return [found.st_size, found.st_mtime_ns]


def hash_of(file: SourceFile) -> str:
    """SHA-256 of the contents, so that a moved or copied file stays the same file; `datasets`' own for a data set.

    Raises:
        UnreadableFile: the file cannot be read.
        DataError: the data set is not to be had.
    """
    if file.kind == "dataset":
        from bigtune.data.hub import fingerprint

        return fingerprint(file.dataset, file.config, file.split)
    with reading(file.path), Path(file.path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into one line that names it.

    Raises:
        UnreadableFile: the file cannot be opened, is damaged, or ends too early.
    """
    try:
        yield
    except OSError as error:
        # pyarrow's own OSErrors have no number, and say several lines.
        reason = os.strerror(error.errno) if error.errno else str(error).split("\n")[0][:200]
        raise UnreadableFile(f"{path}: cannot be read ({reason}); mend or remove the file") from None
    except (EOFError, zlib.error) as error:
        raise UnreadableFile(f"{path}: damaged or cut off ({error}); mend or remove the file") from None


def open_bytes(path: str, compression: str | None) -> Any:
    """The file, decompressed, to `read` from. All members of a gzip and all frames of a zstd file are one."""
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(path, "zstd")
    return Path(path).open("rb")


class _Found:
    """Collects the paths of one source."""

    def __init__(self, split: str | None) -> None:
        self.split, self.split_used = split, False
        self.paths: list[str] = []
        self.ignored: list[str] = []
        self._seen: set[str] = set()  # folders and files, resolved: links can lead in circles

    def add(self, name: str) -> None:
        if Path(name).is_dir():
            self._add_folder(name)
        elif os.path.lexists(name):
            self._add_file(name)
        elif glob.has_magic(name):
            matched = sorted(set(glob.glob(name, recursive=True)))  # noqa: PTH207  # Path's takes no absolute one
            if not matched:
                raise DataError(f"{name}: the pattern matches no file (in {Path.cwd()}); correct it under sources")
            for match in matched:
                if not Path(match).is_dir():
                    self._add_file(match)
                elif "**" not in name:  # which matches what is inside by itself
                    self._add_folder(match)
        else:
            raise DataError(f"{Path(name).absolute()}: no such file; correct the path under sources")

    def _add_file(self, name: str) -> None:
        path = Path(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name!r}: the file's name is not UTF-8; rename it") from None
        # A pipe or device: opening it may wait for ever. A link to a file that is there already: its rows would repeat.
        if (path.exists() and not path.is_file()) or (real := str(path.resolve())) in self._seen:
            self.ignored.append(name)
        else:
            self._seen.add(real)
            self.paths.append(name)  # a dangling link too: reading it says so

    def _add_folder(self, name: str) -> None:
        folder = Path(name)
        real = str(folder.resolve())
        if real in self._seen:
            return
        self._seen.add(real)
        with reading(name):
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        names = {entry.name for entry in entries}
        if "dataset_dict.json" in names:
            self._add_splits(folder)
        elif {"state.json", "dataset_info.json"} <= names:
            self._add_saved(folder)
        else:
            for entry in entries:
                if entry.is_dir():
                    self._add_folder(str(entry))
                elif _kind_by_name(entry.name) and entry.name not in NOT_ROWS:
                    self._add_file(str(entry))
                else:
                    self.ignored.append(str(entry))

    def _add_splits(self, folder: Path) -> None:
        """A `DatasetDict` of `save_to_disk`."""
        splits = _read_state(folder / "dataset_dict.json", lambda state: [str(split) for split in state["splits"]])
        chosen = self.split if self.split is not None or len(splits) != 1 else splits[0]
        if chosen not in splits:
            problem = "has several splits" if chosen is None else f"has no split '{chosen}'"
            raise DataError(f"{folder}: {problem}; set the source's split to one of {', '.join(splits)}")
        self.split_used = True
        self._add_saved(folder / str(chosen))

    def _add_saved(self, folder: Path) -> None:
        """A `Dataset` of `save_to_disk`: Arrow files, which its state lists in order."""
        own, names = _read_state(
            folder / "state.json",
            lambda state: (state["_split"], [str(file["filename"]) for file in state["_data_files"]]),
        )
        if self.split is not None and not self.split_used:
            if own != self.split:
                what = "without splits" if own is None else f"of the split '{own}'"
                raise DataError(f"{folder}: a data set {what}; leave the source's split out")
            self.split_used = True
        self.paths += [str(folder / name) for name in names]


def _read_state(path: Path, take: Callable[[Any], Any]) -> Any:
    try:
        with reading(str(path)):
            return take(json.loads(path.read_bytes()))
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UnreadableFile(f"{path}: not what `save_to_disk` writes; save the data set again") from None


def _kind_by_name(name: str) -> str | None:
    lower = name.lower()
    for packed in PACKED:
        lower = lower.removesuffix(packed)
    return KINDS.get(Path(lower).suffix)


def _identify(source: int, path: str) -> SourceFile:
    """What a file is: tables and text by the name, all else by what it begins with."""
    kind, compression = _kind_by_name(path), None
    # An error here comes again when the file is read, and is told then.
    with suppress(UnreadableFile), reading(path):
        with Path(path).open("rb") as opened:
            compression = _compression_of(opened.read(4))
        if kind in (None, "json", "jsonl"):
            with open_bytes(path, compression) as opened:
                kind = _sniff(opened.read(SNIFFED), named=kind is not None)
    return SourceFile(source, path, kind or "jsonl", compression)


def _compression_of(head: bytes) -> str | None:
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):  # a skippable frame
        return "zstd"
    return None


def _sniff(head: bytes, named: bool) -> str:
    """One array, or one value a line; for a file whose name says nothing, also the tables that have a mark."""
    if not named and head[:4] == b"PAR1":
        return "parquet"
    if not named and (head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff"):
        return "arrow"
    return "json" if head.removeprefix(BOM).lstrip(b" \t\r\n").startswith(b"[") else "jsonl"


def _check_names(source: Source) -> None:
    known = (*ROW_KEYS, *TURN_KEYS)
    for key in source.fields:
        if key not in known:
            raise DataError(f"{source.name}: fields: '{key}' is no key of a known format; known: {', '.join(known)}")
    for name, role in source.roles.items():
        if role not in ROLES:
            raise DataError(f"{source.name}: roles: '{name}' is '{role}'; allowed: {', '.join(ROLES)}")
