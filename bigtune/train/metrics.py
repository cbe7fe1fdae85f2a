"""metrics.jsonl: one line an optimizer step, and the one reduction a step that its sums come from.

A step's loss is known on a rank after its backward pass. It is summed over the ranks together with the next
step's counts, so that nothing adds a collective of its own; hence a line is written one step later, or when
a checkpoint or the end asks for it.
"""

import json
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.data.collate import MicroBatch
from bigtune.dist import World
from bigtune.plain import plain


@dataclass(frozen=True, slots=True)
class Flags:
    """What a rank, or, reduced, any of them, asks for: to stop, to save after this step; and that a save failed."""

    stop: bool = False
    save: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Totals:
    """One step's sums over all ranks. `held` are those of the step before, as `MetricsLog.held` has them."""

    supervised: int
    weight: float  # of the supervised tokens: what the loss is divided by
    tokens: int
    asked: Flags
    held: list[float]


def reduce_totals(batches: Sequence[MicroBatch], asked: Flags, held: Sequence[float]) -> Totals:
    """The control reduction: called once a step on every rank, after the step's rows are fetched."""
    supervised, weight, tokens, *sums = dist.all_sum(
        [
            sum(batch.supervised for batch in batches),
            sum(batch.weight for batch in batches),
            sum(batch.tokens for batch in batches),
            *map(float, astuple(asked)),
            *held,
        ]
    )
    flags, held = sums[: len(fields(Flags))], sums[len(fields(Flags)) :]
    return Totals(int(supervised), weight, int(tokens), Flags(*(flag > 0 for flag in flags)), held)


@dataclass(slots=True)
class MetricsLog:
    """Rank 0's metrics file; on other ranks it writes nothing.

    `start` is `time.monotonic()` at the start of the process. `held` is what the ranks are to sum of a step: its loss
    and its routers' loss, in nats, and a place for every rank's own seconds.
    """

    path: Path | None
    start: float
    world: World = World()  # noqa: RUF009  # frozen
    last: dict[str, Any] = field(default_factory=dict)
    held: list[float] = field(init=False)
    _held: dict[str, Any] = field(default_factory=dict)
    _held_weight: float = 0.0

    def __post_init__(self) -> None:
        self._hold_nothing()

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

    def hold(
        self, loss_sum: float, weight: float, own_seconds: float, aux_sum: float | None = None, **line: Any
    ) -> None:
        """Keep a step's line until its loss is known.

        Args:
            loss_sum: this rank's; `weight` is that of all ranks.
            own_seconds: what this rank took without waiting for others.
            aux_sum: the loss of this rank's routers times its tokens; None for a model without any.
        """
        self._held, self._held_weight = line, weight
        if aux_sum is not None:
            self._held["router_aux_loss"] = None
        self.held[0], self.held[1], self.held[2 + self.world.rank] = loss_sum, aux_sum or 0.0, own_seconds

    def note(self, **more: float) -> None:
        """Add to the line held."""
        self._held |= more

    def flush(self) -> None:
        """Write the line held with a reduction of its own, collectively."""
        self.complete(dist.all_sum(self.held))

    def complete(self, held: Sequence[float]) -> None:
        """Write the line held, if any; `held` is summed over all ranks."""
        if not self._held:
            return
        loss_sum, aux_sum, *seconds = held
        self.last = {**self._held, "loss": loss_sum / (self._held_weight or 1.0), "rank_seconds": _spread(seconds)}
        if "router_aux_loss" in self._held:
            self.last["router_aux_loss"] = aux_sum / (self._held["tokens"] or 1)
        self._hold_nothing()
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(self.last)) + "\n")

    def elapsed(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self.start

    def _hold_nothing(self) -> None:
        self._held, self.held = {}, [0.0] * (2 + self.world.world_size)


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of each rank's seconds, in a form that does not grow with the ranks."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    middle = {"least": min(seconds), "median": statistics.median(seconds), "most": seconds[slowest]}
    return {**{name: round(value, 6) for name, value in middle.items()}, "slowest_rank": slowest}


def peak_memory_gib() -> float:
    """The most memory that this worker has held: of its GPU on CUDA, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
