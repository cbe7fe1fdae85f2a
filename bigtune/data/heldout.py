"""Held-out rows as training sees rows: tokenised by the same recipe, and packed."""

from pathlib import Path

import numpy as np

from bigtune.config import Run
from bigtune.data.document import Document
from bigtune.data.formats import read_conversations
from bigtune.data.holdout import bound_of, held_out_rows
from bigtune.data.plan import plan_rows
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Row
from bigtune.errors import DataError


def packed_held_out(run: Run, model_path: Path) -> list[Row]:
    """The rows of `evaluate.sources`, or those of `data.holdout`, the heaviest first; the same on every rank.

    Documents longer than `data.sequence_length` are cut there.

    Raises:
        DataError: a source cannot be read, a row cannot be used, or nothing of them is supervised.
    """
    if run.held_out:
        conversations = list(read_conversations(run.held_out, run.data.on_bad_row))
    else:
        conversations = list(held_out_rows(run.data, bound_of(run.data, run.store)))
    documents: list[Document] = []
    for made in Recipe.of(run.data, model_path, run.held_out).chat.encode(conversations):
        if isinstance(made, DataError):
            if run.data.on_bad_row == "error":
                raise made
            continue
        documents += [document.piece(0, min(len(document), run.data.sequence_length)) for document in made]
    documents = [document for document in documents if document.supervised]
    if not documents:
        raise DataError("checkpoint.keep_best: no held-out row has a supervised token; give others in evaluate.sources")
    lengths = np.array([len(document) for document in documents])
    plan = plan_rows(lengths, run.data.sequence_length, seed=0, epoch=0)
    packed = [
        Row(tuple(plan.row(i).tolist()), tuple(documents[j] for j in plan.row(i).tolist())) for i in range(plan.rows)
    ]
    return sorted(packed, key=lambda row: -row.work)
