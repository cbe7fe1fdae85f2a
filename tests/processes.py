"""Processes that tests start, and waiting for them."""

import time
from collections.abc import Callable
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(what: Callable[[], object], seconds: float, why: Callable[[], str] = lambda: "too late") -> None:
    """Wait for something, or fail with what is known of it."""
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, why()
        time.sleep(0.05)
