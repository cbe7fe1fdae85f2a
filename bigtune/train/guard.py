"""What ends a run before it wastes its time: steps that are not finite, a step that hangs, ranks that differ."""

import faulthandler
import hashlib
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from bigtune import dist
from bigtune.data.rows import Row, Rows
from bigtune.dist import World
from bigtune.errors import CheckpointError, TrainError
from bigtune.process import LOST_OTHERS
from bigtune.train.console import WorkerConsole
from bigtune.train.metrics import MetricsLog

FIRST_STEP_SECONDS = 600.0
"""What the first step may take on top: files are opened, kernels are compiled."""
HEAD_START_SECONDS, LEAVE_SECONDS = 1.0, 3.0
"""A rank that waits for others lets those speak first, whose stacks say why; then each lets all finish speaking."""
UNKNOWN_SECONDS, LEAST_SECONDS, TIMES_THE_LONGEST = 3600.0, 120.0, 10.0
"""What a step may take of which nothing is known, what any may, and how much more than the longest before."""
PACKAGE = str(Path(__file__).parent.parent) + os.sep
MOST_PLACES = 8
"""Files and rows that a message names."""


class NonFinite:
    """Counts the steps in a row that were skipped for a loss or gradient that was not finite."""

    def __init__(self, most: int | None, rows: Rows, metrics: MetricsLog, console: WorkerConsole) -> None:
        self._in_a_row = 0
        self._most, self._rows, self._metrics, self._console = most, rows, metrics, console

    def check(self, applied: bool, step: int, losses: Sequence[float], batches: Sequence[Sequence[Row]]) -> None:
        """Take note of a step; say which one is skipped, and in this rank's log its own rows that are to blame.

        Args:
            applied: the same on every rank.
            losses: of this rank's micro-batches.
            batches: the rows of each.

        Raises:
            TrainError: on every rank, where it is one too many in a row.
        """
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if applied:
            return
        self._console.say(f"step {step}: skipped, a loss or gradient is not finite ({self._in_a_row} in a row)")
        for loss, rows in zip(losses, batches, strict=True):
            if not math.isfinite(loss):
                print(f"step {step}: a loss of {loss} from {self._places(rows)}", flush=True)
        if self._in_a_row == self._most:
            self._metrics.flush()
            raise self._error(step, losses, batches)

    def _error(self, step: int, losses: Sequence[float], batches: Sequence[Sequence[Row]]) -> TrainError:
        """Why the run stops, collectively: names the rows whose loss was not finite, or all of the step's."""
        bad = [row for loss, rows in zip(losses, batches, strict=True) for row in rows if not math.isfinite(loss)]
        every = [row for rows in batches for row in rows]
        told = dist.gather((self._places(bad) if bad else "") + "\n" + self._places(every))
        by_loss, by_step = zip(*((text or "\n").split("\n") for text in told), strict=True)
        if any(by_loss):
            where = "; ".join(f"rank {rank}'s loss of {text}" for rank, text in enumerate(by_loss) if text)
        else:
            where = "all losses were finite but no gradient; the rows were " + "; ".join(filter(None, by_step))
        return TrainError(
            f"step {step}: {self._in_a_row} steps in a row were skipped since a loss or gradient was not finite "
            f"(train.max_skipped_steps); in the last, {where}; look at these rows and the model's weights, lower "
            "optim.learning_rate, or set train.precision: float32"
        )

    def _places(self, rows: Sequence[Row]) -> str:
        places = list(dict.fromkeys(place for row in rows for place in self._rows.where(row)))
        more = f" and {len(places) - MOST_PLACES:,} more" if len(places) > MOST_PLACES else ""
        return " + ".join(places[:MOST_PLACES]) + more


class Watchdog:
    """Ends this rank, with the stacks of its threads in its log, when a step takes too long."""

    def __init__(self, seconds: float | str | None, console: WorkerConsole) -> None:
        """Watch for so many seconds a step; "auto": for as long as steps so far have no doubt about."""
        self._auto, self._console = seconds == "auto", console
        self._seconds = UNKNOWN_SECONDS if isinstance(seconds, str) else seconds
        self._extra, self._longest = FIRST_STEP_SECONDS, 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch one step. It works while the main thread waits in a collective."""
        if self._seconds is None:
            yield
            return
        began, seconds = time.monotonic(), self._seconds + self._extra
        timer = threading.Timer(seconds, self._expire, (number,))
        timer.daemon = True
        timer.start()
        # Should the main thread hang with Python's lock held, no other thread runs; this one needs none.
        faulthandler.dump_traceback_later(seconds + 4 * LEAVE_SECONDS, exit=True, file=sys.stderr.fileno())
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
        if self._auto and not self._extra:  # the first also compiles, and opens files
            self._longest = max(self._longest, time.monotonic() - began)
            self._seconds = min(UNKNOWN_SECONDS, max(LEAST_SECONDS, TIMES_THE_LONGEST * self._longest))
        self._extra = 0.0

    def _limit(self) -> str:
        return f"auto, {self._seconds:.0f} by now" if self._auto else f"{self._seconds:g}"

    def _expire(self, number: int) -> None:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        faulthandler.dump_traceback(file=sys.stderr.fileno())
        waits = _waits(frame)
        time.sleep(HEAD_START_SECONDS if waits else 0.0)
        self._console.fail(
            TrainError(
                f"step {number} took longer than train.step_timeout_seconds ({self._limit()}); this rank "
                f"{'waited for others' if waits else 'was'} in {_place(frame)}; the stacks of all ranks are in "
                f"{self._console.output / 'logs'}/rank-N.log"
            )
        )
        time.sleep(LEAVE_SECONDS + (0.0 if waits else HEAD_START_SECONDS))
        os._exit(LOST_OTHERS if waits else 1)


def _waits(frame: FrameType) -> bool:
    """Whether a thread is in a collective; on CUDA, where they are only begun, it may wait anywhere."""
    return "/torch/distributed/" in frame.f_code.co_filename or frame.f_code.co_name == "wait"


def _place(frame: FrameType) -> str:
    """The innermost of bigtune's own lines, and what it was in."""
    inner, own = frame, frame
    while not own.f_code.co_filename.startswith(PACKAGE) and own.f_back is not None:
        own = own.f_back
    told = f"{own.f_code.co_name} ({own.f_code.co_filename}, line {own.f_lineno})"
    return told if own is inner else f"{inner.f_code.co_name}, called by {told}"


def check_alike(facts: Mapping[str, Sequence[torch.Tensor] | str], world: World, where: str) -> None:
    """Compare what every rank must hold the same, with one reduction.

    Args:
        facts: by what a user would call them: tensors, compared by their bits, or text.

    Raises:
        CheckpointError: on every rank, if any differs from most; names the ranks and what differs.
    """
    slots = [0.0] * (len(facts) * world.world_size)
    for i, fact in enumerate(facts.values()):
        slots[i * world.world_size + world.rank] = float(_hash53(fact))
    hashes = dist.all_sum(slots)
    differing = []
    for i, name in enumerate(facts):
        of_ranks = hashes[i * world.world_size : (i + 1) * world.world_size]
        usual = Counter(of_ranks).most_common(1)[0][0]  # of as many each, rank 0's
        others = [str(rank) for rank, found in enumerate(of_ranks) if found != usual]
        if others:
            differing.append(f"{name} of rank {', '.join(others)}")
    if differing:
        raise CheckpointError(
            f"{where}: not saved, the ranks have drifted apart: other than on most are {'; '.join(differing)}; "
            "look for hosts with other files, other versions or bad memory, and go on from the checkpoint before"
        )


def _hash53(fact: Sequence[torch.Tensor] | str) -> int:
    """53 bits, which float64 holds exactly."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(fact, str):
        digest.update(fact.encode())
    else:
        for tensor in fact:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()) >> 11
