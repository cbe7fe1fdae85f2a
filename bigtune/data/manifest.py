"""What is known of a document store and its parts without reading a document: counts, fingerprints, file names."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtune.data.sources import UNREADABLE
from bigtune.errors import DataError

VERSION = 3
"""Of the store's files, and of the code that makes documents of rows; part of every part's name. Raising it makes all
stores anew, so that nothing is left of what an older bigtune masked or tokenised otherwise."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PartCounts:
    """What one part's rows became. `bad` rows are (row, reason, what to tell the user)."""

    rows: int = 0
    documents: int = 0
    conversations: int = 0  # documents that the chat template was used for; the others are raw text
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0
    highest_token: int = 0
    split_rows: int = 0  # rows of several documents, because the template rewrites earlier turns
    bytes: int = 0  # of the Arrow file
    fields: list[str] = field(default_factory=list)  # of the source's, those that a row had
    bad: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class SourceCounts:
    """One source's share of the documents that are trained on."""

    name: str
    rows: int
    documents: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from. Counts of rows and documents are by reason."""

    fingerprint: str  # of the documents that are trained on: equal fingerprints, equal documents
    files: list[dict[str, Any]]  # source, path, hash, stat, and parts: the bytes of each by its name
    sources: list[SourceCounts]
    rows: int
    documents: int
    conversations: int
    tokens: int
    supervised_tokens: int
    longest_tokens: int
    highest_token: int
    template: str  # name of the chat template: `model` for the tokenizer's own
    template_text: str
    skipped: dict[str, int] = field(default_factory=dict)  # bad rows
    removed: dict[str, int] = field(default_factory=dict)  # good rows that are not trained on
    held_out: int = 0  # rows kept for evaluation
    held_out_below: int = 0  # rows whose content hash is lower are held out
    holdout: float | int | None = None  # what the run file asked for
    silent_tokens: int = 0  # of rows with nothing supervised, which are not trained on
    split_rows: int = 0
    duplicate_ids: int = 0
    ignored_files: list[str] = field(default_factory=list)  # of other kinds, or the same file again
    empty_files: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def part_names(self) -> list[str]:
        """Of all files, in their order."""
        return [name for file in self.files for name in file["parts"]]

    @property
    def supervised_share(self) -> float:
        """Of all tokens that were to be trained on, those of rows with nothing supervised among them."""
        return self.supervised_tokens / max(self.tokens + self.silent_tokens, 1)

    def summary(self) -> str:
        """A line of what is there, and one more for each kind of thing that is not."""
        share = self.supervised_tokens / max(self.tokens, 1)
        lines = [
            f"{self.documents:,} documents of {self.rows:,} rows, {self.tokens:,} tokens, {share:.1%} supervised"
            f" (longest {self.longest_tokens:,})"
        ]
        if self.template != "model" and self.conversations:
            lines[0] += f"; chat template: {self.template}"
            lines[0] += " (the model has none)" if self.template == "plain" else ""
        notes = [f"removed {count:,} rows ({reason})" for reason, count in self.removed.items()]
        notes += [
            f"skipped {count:,} {'files' if reason == UNREADABLE else 'bad rows'} ({reason})"
            for reason, count in self.skipped.items()
        ]
        if self.held_out:
            notes.append(f"held out {self.held_out:,} rows for evaluation")
        return "\n".join([*lines, *(f"  {note}" for note in [*notes, *self.notes()])])

    def notes(self) -> list[str]:
        """What else is worth knowing of how rows became documents."""
        notes = []
        if self.split_rows:
            notes.append(
                f"{self.split_rows:,} rows became a document an answer, since the template rewrites earlier turns"
            )
        if self.duplicate_ids:
            notes.append(f"{self.duplicate_ids:,} rows repeat the id of another; all are kept")
        for what, paths in (
            ("passed over {} files (of other kinds, or the same again)", self.ignored_files),
            ("{} files have no rows", self.empty_files),
        ):
            if paths:
                more = ", …" if len(paths) > 3 else ""
                notes.append(f"{what.format(f'{len(paths):,}')}: {', '.join(paths[:3])}{more}")
        return notes


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`.

    Raises:
        DataError: there is no store, it is not whole, or another version of bigtune wrote it.
    """
    again = "run `bigtune prepare RUN.yaml`"
    try:
        tree = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.absolute()}: no prepared documents here; {again}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the document store cannot be read ({error}); {again}") from None
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        raise DataError(f"{path}: the document store is of another version of bigtune; {again}")
    try:
        return Manifest(**{**tree, "sources": [SourceCounts(**source) for source in tree["sources"]]})
    except (TypeError, KeyError):
        raise DataError(f"{path / MANIFEST}: not a manifest of bigtune's; {again}") from None
