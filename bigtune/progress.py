"""What a person sees while a stage works: a bar on a terminal, now and then a line elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Bar:
    """One stage's progress. `advance_to` may be called as often as one likes."""

    def __init__(self, stage: str, file: IO[str] | None = None) -> None:
        self.stage = stage
        self.console = Console(file=file, highlight=False)
        self._last_line = time.monotonic()
        self._shown = ""
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(stage, total=None, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if not self.console.is_terminal and self._shown and kind is None:
            self.console.print(self._shown, markup=False)

    def advance_to(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that `done` of `total` are done; the total may stay unknown."""
        self._progress.update(self._task, completed=done, total=total, note=note)
        if self.console.is_terminal:
            return
        self._shown = f"{self.stage}: {done}" + (f" of {total}" if total else "") + (f"  {note}" if note else "")
        if time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(self._shown, markup=False)
            self._shown = ""


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own while it loads or saves a model."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def bar(stage: str) -> Iterator[Bar]:
    """A bar on standard error, so that standard output stays for results."""
    import sys

    with Bar(stage, sys.stderr) as shown:
        yield shown
