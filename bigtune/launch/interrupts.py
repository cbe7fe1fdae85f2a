"""What the launcher itself is asked to do: to stop, at once if asked twice, or to have the run saved.

SIGHUP is one, since an ssh session that is lost sends it; under nohup it stays ignored. Only the main thread gets
signals; started from another, a run is interrupted through its workers.
"""

import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Takes signals over while a run is going; `take` hands out what is to be passed on."""

    def __init__(self) -> None:
        self.count = 0
        self.elsewhere = False
        """Whether a batch system asked agents; it asks the launcher as well, sooner or later."""
        self._asked: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPS, signal.SIGUSR1):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def any(self) -> bool:
        """Whether the run is to end."""
        return self.elsewhere or self.count > 0

    def take(self) -> list[int]:
        """Signals for the workers, since the last call: SIGTERM to finish their step and save, SIGKILL for now."""
        asked, self._asked = self._asked, []
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._asked.append(number)
            return
        self.count += 1
        if self.count > 1:
            self._asked.append(signal.SIGKILL)
            return
        with suppress(OSError):  # a terminal that is gone
            print("\nstopping: the workers finish their step and save; again to end them at once", file=sys.stderr)
        self._asked.append(signal.SIGTERM)
