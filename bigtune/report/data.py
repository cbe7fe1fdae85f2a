"""What a run trains on: gathered from its prepared documents as an `Inspection`.

    store ──RowStream──▶ pieces and plan of epoch 0 ──▶ counts, samples, rows

Where the run would be refused, what there is of it is shown all the same: that is when one wants to see it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.config import Data, Run
from bigtune.data.account import require_supervised
from bigtune.data.choose import NOTHING_SUPERVISED
from bigtune.data.manifest import Manifest
from bigtune.data.pieces import Pieces, cut
from bigtune.data.prepare import prepare
from bigtune.data.store import Store
from bigtune.data.stream import RowStream, steps_of
from bigtune.errors import DataError
from bigtune.model.vocabulary import vocabulary_of
from bigtune.report.inspection import Inspection, Loss, SourceShare, Wishes
from bigtune.report.losses import losses_of, losses_of_cutting
from bigtune.report.samples import every_document, first_rows, sample_epoch, sample_silent, sample_store
from bigtune.report.statistics import asked_shares, facts_of, packing_of, statistics_of
from bigtune.report.tokens import Reader

CAPPED = "more than data.sources.max_documents"


def inspect(run: Run, wishes: Wishes, progress: Callable[[int, int | None], None] | None = None) -> Inspection:
    """Look at a run's documents, prepared first if they are not.

    Raises:
        BigtuneError: a source, the model folder or the store cannot be read.
    """
    if run.data.stream:
        from bigtune.report.streamed import inspect_stream

        return inspect_stream(run, wishes)
    model_path = vocabulary_of(run.model, run.output).folder
    manifest = prepare(run.data, model_path, run.store, progress, held_out=run.held_out, check=False)
    store = Store.open(run.store)
    reader = Reader(model_path)
    refusal = ""
    try:
        require_supervised(manifest, run.data)
    except DataError as error:
        refusal = str(error)
    try:
        stream = RowStream(store, run.data, run.train.seed, run.train.epochs)
    except DataError as error:
        return _unpacked(run, store, wishes, reader, refusal or str(error))
    return _packed(run, store, stream, wishes, reader, refusal)


def _packed(run: Run, store: Store, stream: RowStream, wishes: Wishes, reader: Reader, refusal: str) -> Inspection:
    plan, drawn = stream.plan(0)
    pieces, seed, epochs = stream.pieces, run.train.seed, run.train.epochs
    run_steps = steps_of(stream, epochs, run.train.global_batch) if epochs else None
    # Documents that fit the rows, but are not drawn: with weights, other epochs have them.
    left = np.setdiff1d(pieces.document, pieces.document[drawn])
    weighted = run.data.sources[0].weight is not None
    losses = [*losses_of(store), *losses_of_cutting(store, pieces, stream.sequence_length)]
    if len(left) and not weighted:
        losses.append(Loss(CAPPED, len(left), "documents"))
    samples = [*sample_epoch(store, stream, drawn, wishes.samples, seed, reader)]
    if NOTHING_SUPERVISED in store.manifest.removed:
        samples += sample_silent(store, min(1, wishes.samples), seed, reader)
    lost = store.lengths[pieces.document] - pieces.length if pieces.truncated else np.zeros(1, np.int64)
    return Inspection(
        **facts_of(run, store.manifest.template, store.manifest.conversations),
        **_facts_of_store(store.manifest),
        **statistics_of(store.lengths, store.supervised, stream.sequence_length),
        scope="epoch 0",
        refusal=refusal,
        sources=_shares(run.data, store, pieces, drawn),
        losses=tuple(losses),
        truncated_documents=pieces.truncated,
        truncated_tokens=int(lost.sum(dtype=np.int64)),
        split_documents=pieces.split,
        waiting_documents=len(left) if weighted else 0,
        packing=packing_of(run, plan, pieces.length[drawn], pieces.supervised[drawn], wishes.ranks, run_steps),
        samples=tuple(samples),
        rows=tuple(first_rows(store, stream, wishes.rows, reader)),
    )


def _unpacked(run: Run, store: Store, wishes: Wishes, reader: Reader, refusal: str) -> Inspection:
    """What there is to see where no row can be packed: the documents, or those that are left out."""
    manifest, seed, length = store.manifest, run.train.seed, run.data.sequence_length
    try:
        pieces = cut(store, run.data)
    except DataError:  # a document is too long, and that is an error
        whole = np.arange(len(store))
        pieces = Pieces(whole, np.zeros(len(store), np.int32), store.lengths, store.supervised, {}, 0, 0)
    seen, pick = (store, sample_store) if len(store) else (every_document(store), sample_silent)
    return Inspection(
        **facts_of(run, manifest.template, manifest.conversations),
        **_facts_of_store(manifest),
        **statistics_of(seen.lengths, seen.supervised, length),
        scope="prepared documents, of which no row can be packed",
        refusal=refusal,
        sources=_shares(run.data, store, pieces, np.arange(len(pieces))),
        losses=(*losses_of(store), *losses_of_cutting(store, pieces, length)),
        truncated_documents=pieces.truncated,
        truncated_tokens=None,
        split_documents=pieces.split,
        waiting_documents=0,
        packing=None,
        samples=tuple(pick(store, wishes.samples, seed, reader)),
        rows=(),
    )


def _facts_of_store(manifest: Manifest) -> dict[str, Any]:
    return {"source_rows": manifest.rows, "notes": tuple(manifest.notes())}


def _shares(data: Data, store: Store, pieces: Pieces, drawn: npt.NDArray[np.int64]) -> tuple[SourceShare, ...]:
    """What each source gives to an epoch that draws these pieces."""
    n = len(data.sources)
    of = store.sources[pieces.document[drawn]]
    counts = np.bincount(of, minlength=n)
    documents = np.bincount(store.sources[np.unique(pieces.document[drawn])], minlength=n)
    tokens, supervised = (
        np.bincount(of, weights=values[drawn], minlength=n).astype(np.int64)
        for values in (pieces.length, pieces.supervised)
    )
    return tuple(
        SourceShare(
            name=source.name,
            rows=source.rows,
            documents=int(documents[i]),
            pieces=int(counts[i]),
            tokens=int(tokens[i]),
            supervised_tokens=int(supervised[i]),
            tokens_share=float(tokens[i] / max(tokens.sum(), 1)),
            asked_share=asked,
        )
        for i, (source, asked) in enumerate(zip(store.manifest.sources, asked_shares(data), strict=True))
    )
