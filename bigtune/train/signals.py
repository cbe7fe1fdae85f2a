"""What a worker is asked from outside: to stop, or to save and go on.

SIGINT and SIGTERM before the first step end the worker at once: by the kernel, since a rank that waits for another to
come up runs no Python. From then on they set a flag, which the ranks agree on in the step's control reduction; so does
SIGUSR1, which asks for a checkpoint.
"""

import signal
from types import FrameType


class Requests:
    """Whether this worker was asked to stop, and whether to save."""

    def __init__(self) -> None:
        """Be ended by the first two signals, and take over the third."""
        self.stop = self._save = False
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, self._handle)

    def let_steps_end(self) -> None:
        """From here on finish the step first."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
        else:
            self.stop = True
