"""What of the sources is not trained on, by reason, with some rows of each."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigtune.data.pieces import Pieces
from bigtune.data.sources import UNREADABLE
from bigtune.data.store import REMOVED, Manifest, Store
from bigtune.errors import DataError
from bigtune.report.inspection import Example, Loss

EXAMPLES = 3
"""Rows that are told of for each reason."""
HELD_OUT = "held out for evaluation"


def losses_of(store: Store) -> list[Loss]:
    """The rows that became no document.

    Raises:
        DataError: the store's list of them cannot be read.
    """
    manifest = store.manifest
    counts = {**manifest.skipped, **manifest.removed}
    examples = _examples(store, set(counts))
    losses = [
        Loss(reason, count, "files" if reason == UNREADABLE else "rows", tuple(examples[reason]))
        for reason, count in counts.items()
    ]
    return losses + ([Loss(HELD_OUT, manifest.held_out, "rows")] if manifest.held_out else [])


def losses_of_cutting(store: Store, pieces: Pieces, sequence_length: int) -> list[Loss]:
    """Documents, or pieces of them, that fit no row; the examples are those of which nothing is left."""
    gone = np.setdiff1d(np.flatnonzero(store.lengths > sequence_length), pieces.document)[:EXAMPLES]
    examples = tuple(Example(store.where(i), f"{len(store.document(i).input_ids):,} tokens") for i in gone.tolist())
    return [
        Loss(reason, count, "pieces" if reason.startswith("pieces") else "documents", examples)
        for reason, count in pieces.dropped.items()
    ]


def notes_of(manifest: Manifest) -> Iterator[str]:
    """What else is worth knowing of how rows became documents."""
    if manifest.split_rows:
        yield (
            f"{manifest.split_rows:,} rows became a document for each answer, "
            "since the chat template rewrites earlier turns"
        )
    if manifest.duplicate_ids:
        yield f"{manifest.duplicate_ids:,} rows repeat the id of another; all are kept"
    if manifest.ignored_files:
        names = ", ".join(manifest.ignored_files[:EXAMPLES])
        yield f"{len(manifest.ignored_files):,} files of other kinds are ignored: {names}"


def _examples(store: Store, reasons: set[str]) -> dict[str, list[Example]]:
    """The first rows of each reason."""
    found: dict[str, list[Example]] = defaultdict(list)
    path = store.path / REMOVED
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not reasons:
                    break
                row = json.loads(line)
                reason = row["reason"]
                if reason in reasons:
                    found[reason].append(_example(row, reason))
                    if len(found[reason]) == EXAMPLES:
                        reasons.discard(reason)
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = f"remove {store.path} and run `bigtune prepare RUN.yaml`"
        raise DataError(f"{path}: cannot be read ({error}); {again}") from None
    return found


def _example(row: Mapping[str, Any], reason: str) -> Example:
    told = re.sub(r"^\((.*)\)$", r"\1", str(row.get("told", "")).removeprefix(reason).lstrip(" :;"))
    return Example(_place(row), told, _place(row["like"]) if "like" in row else "")


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['file']}, row {row['row']}" if "row" in row else str(row["file"])
