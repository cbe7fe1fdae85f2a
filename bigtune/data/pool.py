"""Worker processes that read and tokenise.

loky starts them as fresh interpreters: nothing is forked from a process that has threads (torch, gloo, a
progress bar), and a script of the user's own is not imported again.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from bigtune.data.parts import Recipe
from bigtune.errors import DataError
from bigtune.process import end_with_parent

_recipe: Recipe | None = None  # of a worker process

T = TypeVar("T")


class Pool(Protocol):
    """Runs `function(recipe, *arguments)`, now or in a worker process."""

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]: ...


@contextmanager
def open_pool(workers: int, recipe: Recipe) -> Iterator[Pool]:
    """Some worker processes; with no workers, this process. They end with this process, however it ends."""
    if not workers:
        yield _Here(recipe)
        return
    from loky import ProcessPoolExecutor

    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    executor = ProcessPoolExecutor(workers, initializer=_begin, initargs=(recipe,), env=environment)
    try:
        yield _Processes(executor)
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def result_of(future: Future[T]) -> T:
    """What a worker made.

    Raises:
        DataError: as the function raised it, or a worker was killed.
    """
    from loky.process_executor import BrokenProcessPool

    try:
        return future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized was killed (out of memory?); lower data.workers and run the command again: "
            "what is finished is kept"
        ) from None


class _Here:
    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(function(self._recipe, *arguments))
        return done


class _Processes:
    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = self._executor.submit(_run, function, *arguments)
        return future


def _begin(recipe: Recipe) -> None:
    global _recipe
    _recipe = recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()


def _run(function: Callable[..., T], *arguments: Any) -> T:
    return function(_recipe, *arguments)
