"""Whether documents and model fit each other, before anything is loaded."""

from typing import Any

from bigtune.data.store import Store
from bigtune.errors import DataError, ModelError


def check_fit(config: Any, store: Store) -> None:
    """Refuse documents that the model cannot compute as it was made to.

    Args:
        config: of the model; a sliding window matters where a layer uses it.

    Raises:
        ModelError: the tokenizer gave a token that the model has no embedding for.
        DataError: a document is longer than the model's context, or than a window that packed attention lacks.
    """
    highest = store.manifest.highest_token
    if highest >= config.vocab_size:
        raise ModelError(
            f"model.path: {config.vocab_size:,} embeddings, but the tokenizer beside them gives token {highest:,}; "
            "resize the model's embeddings, or bring the tokenizer that belongs to it"
        )
    lengths = store.lengths
    at = int(lengths.argmax())
    layers = getattr(config, "layer_types", None)
    windowed = layers is None or "sliding_attention" in layers
    limits = {
        "the model's context": getattr(config, "max_position_embeddings", None),
        "the model's sliding window, which packed attention does not support yet,": windowed
        and getattr(config, "sliding_window", None),
    }
    for what, limit in limits.items():
        if limit and lengths[at] > limit:
            raise DataError(
                f"{store.where(at)}: a document of {lengths[at]:,} tokens, where {what} has {limit:,}; "
                f"set data.sequence_length to {limit:,} or less"
            )
