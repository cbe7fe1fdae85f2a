"""Whether a model of a type that no test holds computes packed documents exactly, found out on the model itself.

Two documents of random tokens are packed, a short one and one as long as the run's longest:

    [A B]    what the model gives for each must be what it gives for each alone, with its own attention;
    [A' B]   with another first document, nothing may change in the second.

State-space and linear-attention layers carry state from one document into the next, and some layers go round the
attention interface: such a model computes document by document, which costs speed and nothing else. A model that sees
later tokens cannot learn to predict them, and is refused. Where the loss head does not give the model's own logits,
these are computed whole.

Shapes: S tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from bigtune.data.collate import MicroBatch
from bigtune.errors import ModelError
from bigtune.model import attention
from bigtune.model.fused import distance
from bigtune.model.load import EXACT
from bigtune.train.engine import Engine

FIRST_TOKENS = 24
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""How far hidden states may be apart, relative to their norm, and still be the same up to the rounding of two kinds of
attention; the same kernels on the same tokens round alike, and `APART` is for these."""
APART = {"float32": 1e-4, "bfloat16": 0.03}

Tokens = npt.NDArray[np.int64]
T = TypeVar("T")


def prove(engine: Engine, longest: int, say: Callable[[str], None]) -> None:
    """Let the engine pack and use its loss head only where they give what the model itself gives; `say` the rest.

    Called on every rank, before the state is restored or anything is learnt.

    Args:
        longest: tokens of the longest document of the run.

    Raises:
        ModelError: the model cannot be run, or sees later tokens.
    """
    objective = engine.objective
    config = objective.model.config
    if config.model_type in EXACT and not _turns_by_length(config):
        return
    random = np.random.default_rng(0)
    first, other = (random.integers(config.vocab_size, size=FIRST_TOKENS) for _ in range(2))
    second = random.integers(config.vocab_size, size=max(2, longest))
    packed, problem = None, "it has an attention of its own"
    if config._attn_implementation == attention.NAME:
        packed, problem = _attempt(lambda: [engine.look(_of(one, second), "hidden") for one in (first, other)])
    objective.pack(False)
    alone, broken = _attempt(lambda: [engine.look(_of(one), "hidden") for one in (first, second)])
    if alone is None:
        raise ModelError(f"model.path: the {config.model_type} model cannot be run: {broken}")
    _refuse_foresight(engine, first, alone[0])
    if packed is not None:
        apart = distance(packed[0][FIRST_TOKENS:], packed[1][FIRST_TOKENS:])
        mixed = distance(packed[0], torch.cat(alone))
        if not (apart <= APART[engine.dtype] and mixed <= TOLERANCE[engine.dtype]):
            problem = f"what it gives changes by {max(apart, mixed):.1%} with the documents before or after"
    if problem:
        attention.kernels_used.clear()  # it has none of bigtune's
        say(
            f"attention: a {config.model_type} model cannot keep packed documents apart ({problem}); it computes one "
            "document at a time: exact, and slower"
        )
    else:
        objective.pack(True)
    _prove_head(engine, first, say)


def _turns_by_length(config: Any) -> bool:
    """Whether positions turn by the length of the whole sequence, as with dynamic and long RoPE: a long document would
    change the short ones in its row."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _refuse_foresight(engine: Engine, tokens: Tokens, hidden_SD: torch.Tensor) -> None:
    """Change the last token: nothing before it may."""
    changed = np.append(tokens[:-1], (tokens[-1] + 1) % engine.objective.model.config.vocab_size)
    moved = distance(engine.look(_of(changed), "hidden")[:-1], hidden_SD[:-1])
    if not moved <= TOLERANCE[engine.dtype]:
        raise ModelError(
            f"model.path: the {engine.objective.model.config.model_type} model sees the tokens that it should learn to "
            "predict; give a decoder, or set is_decoder in its config.json if it is one"
        )


def _prove_head(engine: Engine, tokens: Tokens, say: Callable[[str], None]) -> None:
    objective = engine.objective
    known = objective.head is not None
    if known:
        wanted = engine.look(_of(tokens), "logits").float()
        known = distance(engine.look(_of(tokens), "head"), wanted) <= TOLERANCE[engine.dtype]
    if not known:
        objective.head = None
        say(
            f"loss: the output of a {objective.model.config.model_type} model is none that the loss head knows; its "
            "own full logits are computed: exact, and with more memory"
        )


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """What an action gives, or why it does not: models of all kinds fail in all ways."""
    try:
        return action(), ""
    except Exception as error:
        return None, str(error).strip().split("\n")[0] or type(error).__name__


def _of(*documents: Tokens) -> MicroBatch:
    lengths = [len(document) for document in documents]
    nothing = np.zeros(0, dtype=np.int64)
    return MicroBatch(
        input_ids=np.concatenate(documents),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        document_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        predict_at=nothing,
        targets=nothing,
        weights=nothing.astype(np.float32),
        tokens=sum(lengths),
    )
