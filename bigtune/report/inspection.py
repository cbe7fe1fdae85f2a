"""What `bigtune inspect` shows, as values; `data` gathers them, `terminal` and `page` draw them."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from bigtune.report.histogram import Histogram
from bigtune.report.tokens import Token


@dataclass(frozen=True, slots=True)
class Wishes:
    """How much is shown, and for how many ranks batches are dealt."""

    samples: int = 3
    rows: int = 1
    ranks: int = 2


@dataclass(frozen=True, slots=True)
class SourceShare:
    """One source in the first epoch. `pieces` are its documents, once for each time and part that they are read."""

    name: str
    rows: int | None  # of its files; None where they were not read to their end
    documents: int
    pieces: int
    tokens: int
    supervised_tokens: int
    tokens_share: float  # of the epoch's tokens
    asked_share: float | None  # by `weight`

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / max(self.tokens, 1)


@dataclass(frozen=True, slots=True)
class Example:
    """One row that is left out: where it is, what is wrong with it, and the row that it repeats."""

    where: str
    told: str = ""
    like: str = ""


@dataclass(frozen=True, slots=True)
class Loss:
    """What is not trained on, and why."""

    reason: str
    count: int
    unit: str  # rows, documents, pieces or files
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True)
class Packing:
    """How the first epoch fills its rows, and how even its batches are. The imbalances are the largest rank's load
    over the mean one's, the worst of all batches."""

    sequence_length: int
    rows: int
    pieces: int
    tokens: int
    steps: int | None  # an epoch; None where its length is not known
    run_steps: int  # of the whole run
    ranks: int
    micro_batch: int
    global_batch: int
    work_imbalance: float  # of the squared document lengths
    supervised_imbalance: float  # of the supervised tokens

    @property
    def efficiency(self) -> float:
        return self.tokens / (self.rows * self.sequence_length)

    @property
    def pieces_per_row(self) -> float:
        return self.pieces / self.rows


@dataclass(frozen=True, slots=True)
class Sample:
    """One document as the model reads it. `where` is its file and row, `note` which part of the row it is, if so."""

    where: str
    note: str
    tokens: tuple[Token, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(token.count for token in self.tokens)

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return sum(token.count for token in self.tokens if token.supervised)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The documents of one row, end to end."""

    number: int  # from 0
    sequence_length: int
    documents: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        return sum(document.length for document in self.documents)

    @property
    def fill(self) -> float:
        return self.tokens / self.sequence_length


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that is shown of a run. None or empty is what a stream or a refused run leaves unknown."""

    model: str
    output: str
    scope: str  # what the numbers are of
    streamed: bool
    refusal: str  # why training would refuse the run; empty where it would not
    template: str  # in words
    template_name: str
    sequence_length: int
    conversations: int | None  # documents that the template was used for
    source_rows: int | None
    sources: tuple[SourceShare, ...]
    losses: tuple[Loss, ...]
    truncated_documents: int | None
    truncated_tokens: int | None
    split_documents: int | None
    waiting_documents: int  # not in the first epoch, because of weights or caps
    notes: tuple[str, ...]
    lengths: Histogram | None  # of documents before they are cut, in tokens
    length_percentiles: dict[str, float] | None
    supervised_shares: Histogram | None  # of documents
    supervised_percentiles: dict[str, float] | None
    packing: Packing | None
    samples: tuple[Sample, ...]
    rows: tuple[PackedRow, ...]

    @property
    def total(self) -> SourceShare:
        """All sources together."""
        return SourceShare(
            name="all",
            rows=self.source_rows,
            documents=sum(source.documents for source in self.sources),
            pieces=sum(source.pieces for source in self.sources),
            tokens=sum(source.tokens for source in self.sources),
            supervised_tokens=sum(source.supervised_tokens for source in self.sources),
            tokens_share=float(any(source.tokens for source in self.sources)),
            asked_share=None,
        )

    @property
    def dropped(self) -> dict[str, int]:
        """What is not trained on, by reason."""
        counts: Counter[str] = Counter()
        for loss in self.losses:
            counts[loss.reason] += loss.count
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        """The statistics, as plain values for `json.dump`."""
        packing, total = self.packing, self.total
        return {
            "model": self.model,
            "output": self.output,
            "scope": self.scope,
            "streamed": self.streamed,
            "refused": self.refusal or None,
            "template": self.template_name,
            "template_documents": self.conversations,
            "source_rows": self.source_rows,
            "documents": total.documents,
            "dropped": self.dropped,
            "dropped_units": {loss.reason: loss.unit for loss in self.losses},
            "truncated_documents": self.truncated_documents,
            "truncated_tokens": self.truncated_tokens,
            "split_documents": self.split_documents,
            "waiting_documents": self.waiting_documents,
            "notes": list(self.notes),
            "rows": packing.rows if packing else 0,
            "tokens": total.tokens,
            "supervised_tokens": total.supervised_tokens,
            "supervised_share": total.supervised_share,
            "sequence_length_tokens": self.sequence_length,
            "packing_efficiency": packing.efficiency if packing else None,
            "pieces_per_row": packing.pieces_per_row if packing else None,
            "steps_per_epoch": packing.steps if packing else None,
            "run_steps": packing.run_steps if packing else None,
            "imbalance": packing
            and {
                "ranks": packing.ranks,
                "micro_batch_rows": packing.micro_batch,
                "global_batch_rows": packing.global_batch,
                "work": packing.work_imbalance,
                "supervised_tokens": packing.supervised_imbalance,
            },
            "lengths_tokens": self.length_percentiles,
            "supervised_shares": self.supervised_percentiles,
            "sources": [
                asdict(source) | {"supervised_share": source.supervised_share} for source in self.sources
            ],
        }  # fmt: skip
