"""Rows kept from training, chosen by what they say: a hash of a row's content below a bound.

So the choice is the same whatever rows are added (with a number of rows: as long as those do not come among the
lowest), and rows that say the same are never on both sides.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigtune.config import Data
from bigtune.data.conversation import Conversation
from bigtune.data.formats import ReadCounts, read_conversations
from bigtune.data.manifest import read_manifest
from bigtune.errors import DataError

NO_ROWS = np.empty(0, np.uint64)


def bound(holdout: float | int | None, content: npt.NDArray[np.uint64] = NO_ROWS) -> int:
    """The content hash below which a row is held out; `content` of all rows matters where their number is given."""
    if holdout is None:
        return 0
    if isinstance(holdout, float):
        return int(holdout * 2**64)
    distinct = np.unique(content)
    return int(distinct[holdout]) if holdout < len(distinct) else 2**64 - 1


def bound_of(data: Data, store: Path) -> int:
    """The bound of a run.

    Raises:
        DataError: a number of rows is held out and the documents are not prepared with it, which finds the bound.
    """
    if isinstance(data.holdout, int):
        manifest = read_manifest(store)
        if manifest.holdout != data.holdout:
            raise DataError(
                f"{store}: prepared with another data.holdout ({manifest.holdout}, and now {data.holdout}); "
                "run `bigtune prepare RUN.yaml`"
            )
        return manifest.held_out_below
    return bound(data.holdout)


def held_out_rows(data: Data, below: int, counts: ReadCounts | None = None) -> Iterator[Conversation]:
    """The rows of the sources that are kept from training.

    Raises:
        DataError: a source cannot be read, or, unless bad rows are skipped, a row cannot be used.
    """
    rows = read_conversations(data.sources, data.on_bad_row, counts)
    return (row for row in rows if row.content_hash < below)
