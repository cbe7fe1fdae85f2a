"""Where a step's time goes: seconds of each of its parts, by a clock that makes nothing wait.

A part within another counts for itself alone, as the sums of gradients do, which happen during the backward pass. On
CUDA the clock is the GPU's own, read when the step is over.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Phases:
    """Seconds by phase of what runs in this process's main thread."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, str | None, Any, Any]] = []
        self._within: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs under it as `name`, and no longer as the phase it is in."""
        outer, self._within, began = self._within, name, now()
        try:
            yield
        finally:
            self._spans.append((name, outer, began, now()))
            self._within = outer

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """The same function, counted as `name`."""

        def counted(*args: Any, **options: Any) -> T:
            with self.phase(name):
                return function(*args, **options)

        return counted

    def take(self) -> dict[str, float]:
        """Seconds since the last call. On CUDA, call it where the host has waited for the step's work anyway."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, outer, began, ended in self._spans:
            length = seconds_between(began, ended)
            seconds[name] += length
            if outer is not None:
                seconds[outer] -= length
        self._spans = []
        return dict(seconds)


def now() -> Any:
    """A mark on the clock of the device."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(began: Any, ended: Any) -> float:
    """Between two marks."""
    return float(began.elapsed_time(ended)) / 1e3 if torch.cuda.is_available() else float(ended - began)
