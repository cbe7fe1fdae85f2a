"""What a process owes the one that started it."""

import ctypes
import signal


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, so that no orphan is left (Linux)."""
    set_parent_death_signal = 1
    try:
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    except (OSError, AttributeError):  # not Linux
        return
