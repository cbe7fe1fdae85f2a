"""The numbers of an inspection, whether its documents come from a store or from a stream."""

from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.config import Data, Run
from bigtune.data.deal import worst_imbalance
from bigtune.data.plan import Plan
from bigtune.report.histogram import of_counts, of_shares, percentiles
from bigtune.report.inspection import Packing


def facts_of(run: Run, template: str, conversations: int | None) -> dict[str, Any]:
    """What an inspection says of the run itself. `conversations` are the documents that the template made."""
    if conversations == 0:
        told = "none is used: all documents are plain text"
    elif run.data.chat_template is not None:
        told = f"{template}, by data.chat_template"
    else:
        told = "the tokenizer's own" if template == "model" else f"bigtune's {template}, for the tokenizer has none"
    return {
        "model": str(run.model.path),
        "output": str(run.output),
        "streamed": run.data.stream,
        "template": told,
        "template_name": template,
        "sequence_length": run.data.sequence_length,
        "conversations": conversations,
    }


def statistics_of(
    lengths: npt.NDArray[np.integer], supervised: npt.NDArray[np.integer], sequence_length: int
) -> dict[str, Any]:
    """What an inspection says of the documents' lengths and supervised tokens, [N] both."""
    shares = supervised / lengths.clip(1)
    some = len(lengths) > 0
    return {
        "lengths": of_counts(lengths, sequence_length) if some else None,
        "length_percentiles": percentiles(lengths) if some else None,
        "supervised_shares": of_shares(shares) if some else None,
        "supervised_percentiles": percentiles(shares) if some else None,
    }


def packing_of(
    run: Run,
    plan: Plan,
    lengths: npt.NDArray[np.integer],
    supervised: npt.NDArray[np.integer],
    ranks: int,
    run_steps: int | None,
) -> Packing:
    """How a plan fills its rows. `lengths` and `supervised` [N] are tokens of what the plan packs."""
    micro_batch, global_batch = run.train.micro_batch, run.train.global_batch
    worst = worst_imbalance(plan, lengths.astype(np.int64) ** 2, supervised, ranks, micro_batch, global_batch)
    return Packing(
        sequence_length=run.data.sequence_length,
        rows=plan.rows,
        pieces=len(plan.documents),
        tokens=int(lengths.sum(dtype=np.int64)),
        steps=None if run.data.stream else -(-plan.rows // global_batch),
        run_steps=run_steps or run.train.steps or 0,
        ranks=ranks,
        micro_batch=micro_batch,
        global_batch=global_batch,
        work_imbalance=worst.work,
        supervised_imbalance=worst.supervised,
    )


def asked_shares(data: Data) -> list[float | None]:
    """Each source's share of the tokens, as the weights ask for."""
    weights = [source.weight for source in data.sources]
    total = sum(weight or 0 for weight in weights)
    return [None if weight is None else weight / total for weight in weights]
