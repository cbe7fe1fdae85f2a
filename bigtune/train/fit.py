"""The rows that a run trains on, and whether the model can compute them."""

from typing import Any

from bigtune.config import Run
from bigtune.data.rows import Rows
from bigtune.data.store import Store
from bigtune.data.stream import RowStream
from bigtune.errors import DataError, ModelError
from bigtune.model.vocabulary import vocabulary_of


def open_rows(run: Run, begins: bool = True) -> Rows:
    """The rows of the run's store, or of its sources where it streams them. Where a run `begins`, a stream is looked
    at: later its first window would be made for nothing.

    Raises:
        DataError: the store is missing, a source cannot be read, or next to nothing is supervised. No process
            of a stream is left then.
    """
    if not run.data.stream:
        return RowStream(Store.open(run.store), run.data, run.train.seed, run.train.epochs)
    from bigtune.data.live import LiveRows
    from bigtune.data.recipe import Recipe

    model_path = vocabulary_of(run.model, run.output).folder
    rows = LiveRows(run.data, Recipe.of(run.data, model_path, run.held_out), run.train.seed)
    try:
        if begins:
            rows.require_supervised(rows.first_window())
    except BaseException:
        rows.close()  # no one else can: the caller has no rows
        raise
    return rows


def check_fit(config: Any, rows: Rows) -> None:
    """Refuse documents that the model cannot compute as it was made to.

    Args:
        config: of the model.

    Raises:
        ModelError: the tokenizer gave a token that the model has no embedding for.
        DataError: a document is longer than the model's context.
    """
    highest = rows.highest_token
    if highest >= config.vocab_size:
        raise ModelError(
            f"model.path: {config.vocab_size:,} embeddings, but the tokenizer beside them gives token {highest:,}; "
            "name such tokens in model.add_tokens, which gives them rows, or bring the tokenizer that belongs to it"
        )
    longest, where = rows.longest()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise DataError(
            f"{where}: a document of {longest:,} tokens, where the model's context has {limit:,}; "
            f"set data.sequence_length to {limit:,} or less"
        )
