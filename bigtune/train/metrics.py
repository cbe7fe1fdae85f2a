"""metrics.jsonl: one line an optimizer step, and the one reduction a step that its sums come from.

A step's loss is known on a rank after its backward pass. It is summed over the ranks together with the next
step's counts, so that nothing adds a collective of its own; hence a line is written one step later, or when
a checkpoint or the end asks for it.
"""

import json
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.data.collate import MicroBatch


@dataclass(frozen=True, slots=True)
class Totals:
    """One step's sums over all ranks. `loss` is the step before's weighted sum, in nats."""

    supervised: int
    weight: float  # of the supervised tokens: what the loss is divided by
    tokens: int
    stop: bool
    loss: float


def reduce_totals(batches: Sequence[MicroBatch], stop: bool, held_loss: float) -> Totals:
    """The control reduction: called once a step on every rank, after the step's rows are fetched."""
    supervised, weight, tokens, stops, loss = dist.all_sum(
        [
            sum(batch.supervised for batch in batches),
            sum(batch.weight for batch in batches),
            sum(batch.tokens for batch in batches),
            float(stop),
            held_loss,
        ]
    )
    return Totals(int(supervised), weight, int(tokens), stops > 0, loss)


@dataclass(slots=True)
class MetricsLog:
    """Rank 0's metrics file; on other ranks it writes nothing.

    `start` is `time.monotonic()` at the start of the process.
    """

    path: Path | None
    start: float
    last: dict[str, Any] = field(default_factory=dict)
    held_loss: float = 0.0
    _held: dict[str, Any] = field(default_factory=dict)
    _held_weight: float = 0.0

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run computes again."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut off
        aside = self.path.with_suffix(".new")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(self.path)

    def hold(self, loss_sum: float, weight: float, **line: Any) -> None:
        """Keep a step's line until its loss is known; `loss_sum` is this rank's, `weight` that of all ranks."""
        self._held, self._held_weight, self.held_loss = line, weight, loss_sum

    def flush(self) -> None:
        """Write the line held with a reduction of its own, collectively."""
        self.complete(dist.all_sum([self.held_loss])[0])

    def complete(self, loss_sum: float) -> None:
        """Write the line held, if any; `loss_sum` is over all ranks."""
        if not self._held:
            return
        self.last = {**self._held, "loss": loss_sum / (self._held_weight or 1.0)}
        self._held, self.held_loss = {}, 0.0
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_without_nan(self.last)) + "\n")

    def elapsed(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self.start


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }


def peak_memory_gib() -> float:
    """The most memory that this worker has held: of its GPU on CUDA, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
