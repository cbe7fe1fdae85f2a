"""Batches assembled ahead of the training, in a thread, so that a step does not wait for its data.

    rows ──take──▶ one global batch ──deal──▶ this rank's micro-steps ──collate──▶ arrays ──queue──▶ the loop

The thread is built after a run's state is restored, and begins at its position.
"""

import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from bigtune.data.collate import MicroBatch, collate
from bigtune.data.deal import Imbalance, deal, imbalance
from bigtune.data.rows import Position, Row, Rows
from bigtune.dist import World

AHEAD = 2
"""Global batches that wait for the loop, at most."""
LEAVE_SECONDS = 5.0
"""How long a loop that leaves waits for the thread. One that hangs in its data dies with the process, as a daemon:
the loop leaves for a reason, an error or a stop, and that must get out."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step's micro-batches of a rank, and where the data goes on after it."""

    batches: list[MicroBatch]
    rows: list[list[Row]]  # of each micro-batch
    after: Position
    imbalance: Imbalance


class Loader:
    """`with Loader(…) as loader: step = loader.next()`. `waited_seconds` grows by what the loop had to wait."""

    def __init__(self, rows: Rows, position: Position, world: World, micro_batch: int, global_batch: int) -> None:
        self.waited_seconds = 0.0
        self._rows, self._position, self._world = rows, position, world
        self._micro_batch, self._global_batch = micro_batch, global_batch
        self._queue: queue.Queue[Step | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="bigtune-loader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()  # a thread that is putting looks at it
        self._thread.join(LEAVE_SECONDS)

    def next(self) -> Step:
        """The next step of this rank; one without documents where the stream has ended.

        Raises:
            BigtuneError: what went wrong in the thread.
        """
        began = time.monotonic()
        step = self._queue.get()
        self.waited_seconds += time.monotonic() - began
        if isinstance(step, BaseException):
            raise step
        return step

    def _fill(self) -> None:
        position = self._position
        try:
            while not self._closed.is_set():
                rows, position = self._rows.take(position, self._global_batch)
                self._put(step_of(rows, position, self._world, self._micro_batch, self._global_batch))
        except BaseException as error:  # the loop raises it again
            self._put(error)

    def _put(self, step: Step | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(step, timeout=0.1)
                return
            except queue.Full:
                continue


def step_of(rows: list[Row], after: Position, world: World, micro_batch: int, global_batch: int) -> Step:
    """The share of a global batch that falls to this rank."""
    work = np.array([row.work for row in rows], dtype=np.int64)
    supervised = np.array([row.supervised for row in rows], dtype=np.int64)
    slots = deal(work, supervised, world.data_world, micro_batch, global_batch)
    mine = [[rows[i] for i in micro_step if i >= 0] for micro_step in slots[world.data_rank]]
    return Step([collate(part) for part in mine], mine, after, imbalance(slots, work, supervised))
