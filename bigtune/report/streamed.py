"""What a run with `data.stream: true` trains on: the first window of its stream, and the beginnings of its sources."""

from collections.abc import Iterator

import numpy as np

from bigtune.config import Run
from bigtune.data.document import Document
from bigtune.data.files import read_chunks
from bigtune.data.live import BLOCK_BYTES, LiveRows, NothingToTrainOn
from bigtune.data.parts import collect
from bigtune.data.plan import Plan
from bigtune.data.recipe import Recipe
from bigtune.data.rows import Row
from bigtune.data.sources import SourceFile, UnreadableFile, resolve_sources
from bigtune.errors import DataError
from bigtune.model.vocabulary import vocabulary_of
from bigtune.report.inspection import Inspection, Loss, PackedRow, Sample, SourceShare, Wishes
from bigtune.report.samples import draw
from bigtune.report.statistics import facts_of, packing_of, statistics_of
from bigtune.report.tokens import Reader, learnt_weights


def inspect_stream(run: Run, wishes: Wishes) -> Inspection:
    """Look at the beginning of a stream. Nothing is known of the rest: not how long it is, nor how it is mixed.

    Raises:
        BigtuneError: a source or the model folder cannot be read, or a row cannot be used.
    """
    recipe = Recipe.of(run.data, vocabulary_of(run.model, run.output).folder, run.held_out)
    window: list[Row] = []
    refusal = ""
    live = LiveRows(run.data, recipe, run.train.seed)
    try:
        first = live.first_window()
        window = first.rows
        live.require_supervised(first)
    except NothingToTrainOn as error:
        refusal = str(error)
    except DataError as error:
        if not window:
            raise
        refusal = str(error)
    finally:
        live.close()
    begun = list(_beginnings(run, recipe))
    return _inspection(run, wishes, recipe, begun, window, dict(live.lost), refusal)


def _inspection(
    run: Run,
    wishes: Wishes,
    recipe: Recipe,
    begun: list[tuple[int, str, Document]],
    window: list[Row],
    lost: dict[str, int],
    refusal: str,
) -> Inspection:
    reader = Reader(vocabulary_of(run.model, run.output).folder)
    documents = [document for row in window for document in row.documents]
    shown = documents or [document for _, _, document in begun]
    lengths = np.array([len(document) for document in shown], dtype=np.int64)
    supervised = np.array([int((learnt_weights(document) > 0).sum()) for document in shown], dtype=np.int64)
    packing = None
    if window:
        offsets = np.cumsum([0, *(len(row.documents) for row in window)])
        plan = Plan(np.arange(len(documents)), offsets)
        packing = packing_of(run, plan, lengths, supervised, wishes.ranks, None)
    name = ", ".join(source.name for source in run.data.sources)
    tokens = int(lengths.sum()) if window else 0
    learnt = [begun[i] for i in range(len(begun)) if len(begun[i][2].spans)] or begun
    sources = np.array([source for source, _, _ in learnt], dtype=np.int64)
    return Inspection(
        **facts_of(run, recipe.chat.name, None),
        **statistics_of(lengths, supervised, run.data.sequence_length),
        scope="the first window of the stream" if window else "the beginning of each source",
        refusal=refusal,
        source_rows=None,
        sources=(
            SourceShare(
                name=name,
                rows=None,
                documents=len(documents),
                pieces=len(documents),
                tokens=tokens,
                supervised_tokens=int(supervised.sum()) if window else 0,
                tokens_share=1.0,
                asked_share=None,
            ),
        ),
        losses=tuple(Loss(reason, count, "rows") for reason, count in lost.items() if count),
        truncated_documents=None,
        truncated_tokens=None,
        split_documents=None,
        waiting_documents=0,
        notes=("nothing is prepared, since data.stream is true: how much there is, and of which source, is not known",),
        packing=packing,
        samples=tuple(
            Sample(learnt[i][1], "", reader.read(learnt[i][2])) for i in draw(sources, wishes.samples, run.train.seed)
        ),
        rows=tuple(
            PackedRow(
                number,
                run.data.sequence_length,
                tuple(
                    Sample(where, "", reader.read(document))
                    for where, document in zip(row.places, row.documents, strict=True)
                ),
            )
            for number, row in enumerate(window[: wishes.rows])
        ),
    )


def _beginnings(run: Run, recipe: Recipe) -> Iterator[tuple[int, str, Document]]:
    """(source, place, document) of the first rows of each source."""
    seen: set[int] = set()
    for file in resolve_sources(run.data.sources)[0]:
        if file.source in seen:
            continue
        documents = list(_beginning(run, recipe, file))
        if documents:
            seen.add(file.source)
        yield from documents


def _beginning(run: Run, recipe: Recipe, file: SourceFile) -> Iterator[tuple[int, str, Document]]:
    try:
        chunk = next(read_chunks(file, BLOCK_BYTES), None)
    except UnreadableFile:
        if run.data.on_bad_row == "error":
            raise
        return
    if chunk is None:
        return
    collected = collect(recipe, chunk)
    for owner, document in zip(collected.owners, collected.documents, strict=True):
        where = collected.conversations[owner].where
        yield file.source, where, Document(document.input_ids, document.spans, document.weights)
