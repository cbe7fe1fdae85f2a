"""What became of the rows: a manifest of counts, a line for each row that is left out, and whether enough is left."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigtune.config import Data, TrainingSource
from bigtune.data.chat import ChatFormat
from bigtune.data.choose import Choice
from bigtune.data.inputs import InputFile, Inputs
from bigtune.data.manifest import Manifest, PartCounts, SourceCounts
from bigtune.data.sources import UNREADABLE
from bigtune.data.store import Columns
from bigtune.errors import DataError, counted


@dataclass
class Made:
    """What became of one file: its parts in their order, and why it could not be read to its end, if so."""

    file: InputFile
    parts: dict[str, PartCounts] = field(default_factory=dict)
    unreadable: str = ""

    @property
    def rows(self) -> int:
        return sum(counts.rows for counts in self.parts.values())


def manifest_of(
    data: Data, inputs: Inputs, chat: ChatFormat, made: Sequence[Made], columns: Columns, choice: Choice
) -> Manifest:
    """The manifest of a store with the parts `made`, whose documents are `columns`."""
    parts = [counts for of in made for counts in of.parts.values()]
    skipped = Counter(reason for counts in parts for _, reason, _ in counts.bad)
    skipped[UNREADABLE] += sum(bool(of.unreadable) for of in made)
    lengths, supervised = columns.lengths()[choice.chosen], columns.numbers("supervised")[choice.chosen]
    source_of_part = np.array([of.file.file.source for of in made for _ in of.parts], dtype=np.int64)
    source = source_of_part[columns.parts_of(choice.chosen)]
    return Manifest(
        fingerprint=inputs.fingerprint,
        files=[
            {"source": of.file.file.source, "path": of.file.file.path, "hash": of.file.hash,
             "stat": of.file.lasting_stat, "parts": {name: counts.bytes for name, counts in of.parts.items()}}
            for of in made
        ],
        sources=[
            SourceCounts(
                name=named.name,
                rows=sum(of.rows for of in made if of.file.file.source == i),
                documents=int((source == i).sum()),
                tokens=int(lengths[source == i].sum(dtype=np.int64)),
                supervised_tokens=int(supervised[source == i].sum(dtype=np.int64)),
            )
            for i, named in enumerate(data.sources)
        ],
        rows=sum(of.rows for of in made),
        documents=len(choice.chosen),
        conversations=sum(counts.conversations for counts in parts),
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        longest_tokens=int(lengths.max(initial=0)),
        highest_token=max((counts.highest_token for counts in parts), default=0),
        template=chat.name,
        template_text=chat.template,
        skipped={reason: count for reason, count in skipped.items() if count},
        removed=dict(choice.counts),
        held_out=choice.held_out,
        held_out_below=choice.held_out_below,
        holdout=data.holdout,
        silent_tokens=choice.silent_tokens,
        split_rows=sum(counts.split_rows for counts in parts),
        duplicate_ids=choice.duplicate_ids,
        ignored_files=list(inputs.ignored),
        empty_files=[of.file.file.path for of in made if not of.rows and not of.unreadable],
    )  # fmt: skip


def rows_left_out(made: Sequence[Made], columns: Columns, choice: Choice) -> Iterator[dict[str, Any]]:
    """A line for each row that is not trained on: where it is, why, and what row it repeats."""
    paths = [of.file.file.path for of in made for _ in of.parts]

    def where(position: int) -> dict[str, Any]:
        return {"file": paths[columns.place(position)[0]], "row": columns.row(position)}

    for of in made:
        for counts in of.parts.values():
            for row, reason, told in counts.bad:
                yield {"file": of.file.file.path, "row": row, "reason": reason, "told": told}
        if of.unreadable:
            yield {
                "file": of.file.file.path,
                "reason": UNREADABLE,
                "told": f"{of.unreadable}; used are the {of.rows:,} rows before",
            }
    for position, reason, like in choice.removed:
        yield {**where(position), "reason": reason, **({} if like is None else {"like": where(like)})}


def require_fields(made: Sequence[Made], sources: Sequence[TrainingSource]) -> None:
    """Refuse a key in `fields` that no row of its source has: what it was to bring would be missing silently.

    Raises:
        DataError: there is such a key.
    """
    for i, source in enumerate(sources):
        files = [of for of in made if of.file.file.source == i and of.rows]
        found = {known for of in files for counts in of.parts.values() for known in counts.fields}
        for known, path in source.fields.items():
            if files and known not in found:
                raise DataError(
                    f"{source.name}: fields: {known} is to be read from '{path}', which no row has; correct it"
                )


def require_supervised(manifest: Manifest, data: Data) -> None:
    """Refuse a run that has nothing, or next to nothing, to learn.

    Raises:
        DataError: the share of supervised tokens is below `data.min_supervised`; the message says what was lost.
    """
    share, tokens = manifest.supervised_share, manifest.tokens + manifest.silent_tokens
    if manifest.supervised_tokens and share >= data.min_supervised:
        return
    losses = {**manifest.skipped, **manifest.removed}
    if manifest.held_out:
        losses["held out"] = manifest.held_out
    why = counted(losses) or "the files are empty"
    names = ", ".join(source.name for source in data.sources)
    if not manifest.supervised_tokens:
        raise DataError(
            f"{names}: nothing to train on is left of {manifest.rows:,} rows ({why}); mend the rows or data"
        )
    raise DataError(
        f"{names}: only {manifest.supervised_tokens:,} of {tokens:,} tokens ({share:.3%}) are supervised, "
        f"less than data.min_supervised ({data.min_supervised:.3%}); see `bigtune inspect`, or lower it if meant so"
    )
