"""When a run must leave: its own time limit, or the batch system's, with room for the last save.

Measured on a clock that nobody sets; a batch system's end, which is a time of day, is read once.
"""

import os
import time
from collections.abc import Mapping

SPARE_SECONDS = 30.0
"""For what the ranks do after the save."""


class TimeLimit:
    """Seconds that are left to a run."""

    def __init__(self, began: float, minutes: float | None, environment: Mapping[str, str] = os.environ) -> None:
        """
        Args:
            began: `time.monotonic()` at the start of the process.
            minutes: `train.time_limit_minutes`, if any.
            environment: where Slurm tells a job's end, in seconds since 1970.
        """
        ends = [] if minutes is None else [began + 60 * minutes]
        told = environment.get("SLURM_JOB_END_TIME", "")
        if told.isdecimal():
            ends.append(time.monotonic() + int(told) - time.time())
        self._end = min(ends, default=None)
        self._longest_step = 0.0

    def note(self, step_seconds: float) -> None:
        """Take note of how long a step took."""
        self._longest_step = max(self._longest_step, step_seconds)

    def is_near(self, save_seconds: float) -> bool:
        """Whether there is no time for another step and a save, at twice what they take."""
        if self._end is None:
            return False
        needed = 2 * (self._longest_step + save_seconds) + SPARE_SECONDS
        return self._end - time.monotonic() < needed
