"""What a worker is asked from outside: to stop, or to save and go on.

SIGINT and SIGTERM before the first step end the worker at once. From then on they set a flag, which the ranks agree on
in the step's control reduction; so does SIGUSR1, which asks for a checkpoint.
"""

import os
import signal
from types import FrameType

STOPPED = 130
"""The exit code of a command that was interrupted, as shells give it."""


class Requests:
    """Whether this worker was asked to stop, and whether to save."""

    def __init__(self) -> None:
        """Take over the signals."""
        self.stop = False
        self.can_wait = False
        self._save = False
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGUSR1, self._handle)

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
        elif not self.can_wait:
            os._exit(STOPPED)
        else:
            self.stop = True
