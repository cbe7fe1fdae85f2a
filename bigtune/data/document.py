"""A tokenised document: what the store keeps, rows are packed from, and a model reads."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


def _one_each() -> npt.NDArray[np.float32]:
    return np.empty(0, dtype=np.float32)  # filled in __post_init__, where the number of spans is known


@dataclass(frozen=True, slots=True)
class Document:
    """`input_ids` int32 [n]; `spans` int32 [k, 2], half-open ranges of supervised tokens, increasing and disjoint;
    `weights` float32 [k], of each span, above 0, and 1 where not given. Read-only views of a mapped file, maybe."""

    input_ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] = field(default_factory=_one_each)

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.spans):
            object.__setattr__(self, "weights", np.ones(len(self.spans), dtype=np.float32))

    def __len__(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def piece(self, start: int, length: int) -> "Document":
        """The tokens from `start` on, with what is supervised among them: not the first, which nothing predicts."""
        spans = (self.spans - start).clip(1, length)
        kept = spans[:, 0] < spans[:, 1]
        return Document(self.input_ids[start : start + length], spans[kept], self.weights[kept])
