"""Being asked to stop: finish the step, save, leave.

SIGINT and SIGTERM before the first step end the worker at once. From then on they set a flag, which the
ranks agree on in the step's control reduction.
"""

import os
import signal
from types import FrameType

STOPPED = 130
"""The exit code of a command that was interrupted, as shells give it."""


class StopRequest:
    """Whether this worker was asked to stop."""

    def __init__(self) -> None:
        """Take over SIGINT and SIGTERM."""
        self.asked = False
        self.can_wait = False
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.can_wait:
            os._exit(STOPPED)
        self.asked = True
