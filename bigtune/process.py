"""What a process owes the one that started it: to end with it, and an exit code that says why it ended."""

import ctypes
import signal

STOPPED = 130
"""It was interrupted, as shells tell it; a worker has saved then."""
USERS_ERROR = 2
"""A mistake that the user can mend: the same would fail again."""
LOST_OTHERS = 75
"""It ended since other ranks are gone; the cause is elsewhere (EX_TEMPFAIL of sysexits.h)."""


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, so that no orphan is left (Linux)."""
    set_parent_death_signal = 1
    try:
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    except (OSError, AttributeError):  # not Linux
        return


def signal_name(code: int) -> str:
    """The signal of a negative exit code: `9 (SIGKILL)`."""
    try:
        return f"{-code} ({signal.Signals(-code).name})"
    except ValueError:
        return str(-code)
