"""Micro-batches without padding: the documents of some rows, laid end to end.

Shapes: S tokens of a micro-batch, N its documents, K their supervised spans, T its supervised tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bigtune.data.rows import Row


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid end to end, without padding."""

    input_ids: npt.NDArray[np.int64]  # [S]
    position_ids: npt.NDArray[np.int64]  # [S], from 0 in each document
    document_offsets: npt.NDArray[np.int32]  # [N + 1], cumulative
    predict_at: npt.NDArray[np.int64]  # [T], where in S the token before a supervised one stands
    targets: npt.NDArray[np.int64]  # [T], the supervised tokens
    weights: npt.NDArray[np.float32]  # [T], of each in the loss; 1 unless the data says otherwise
    tokens: int  # real ones: S, or 0 for the stand-in of no rows

    @property
    def supervised(self) -> int:
        """T."""
        return len(self.targets)

    @property
    def weight(self) -> float:
        """The summed weight of the supervised tokens: T where each weighs 1."""
        return float(self.weights.sum(dtype=np.float64))

    def apart(self) -> list["MicroBatch"]:
        """Each document in a micro-batch of its own."""
        alone = []
        for start, end in pairwise(self.document_offsets.tolist()):
            here = slice(*np.searchsorted(self.predict_at, (start, end)))
            alone.append(
                MicroBatch(
                    input_ids=self.input_ids[start:end],
                    position_ids=self.position_ids[start:end],
                    document_offsets=np.array([0, end - start], dtype=np.int32),
                    predict_at=self.predict_at[here] - start,
                    targets=self.targets[here],
                    weights=self.weights[here],
                    tokens=end - start if self.tokens else 0,
                )
            )
        return alone


def collate(rows: Sequence[Row]) -> MicroBatch:
    """One flat sequence of the rows' documents.

    No rows give one document of one token with nothing supervised, so that a rank without rows still runs
    the model and its collectives.
    """
    documents = [document for row in rows for document in row.documents]
    ids = [document.input_ids for document in documents] or [np.zeros(1, dtype=np.int32)]
    lengths = np.array([len(part) for part in ids], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.concatenate(ids).astype(np.int64)
    # Of each span: where it begins and ends in its document, where that begins, and its weight.
    spans = np.concatenate([np.empty((0, 2), dtype=np.int64), *(document.spans for document in documents)])
    begins = np.repeat(offsets[: len(documents)], [len(document.spans) for document in documents])
    weights = np.concatenate([np.empty(0, dtype=np.float32), *(document.weights for document in documents)])
    first = np.maximum(spans[:, 0], 1)  # nothing stands before a document's first token to predict it from
    counts = np.maximum(spans[:, 1] - first, 0)
    at = np.arange(counts.sum()) + np.repeat(begins + first - (np.cumsum(counts) - counts), counts)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=np.arange(len(input_ids)) - np.repeat(offsets[:-1], lengths),
        document_offsets=offsets.astype(np.int32),
        predict_at=at - 1,
        targets=input_ids[at],
        weights=np.repeat(weights, counts),
        tokens=len(input_ids) if documents else 0,
    )
