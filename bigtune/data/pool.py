"""Worker processes that read and tokenise.

loky starts them as fresh interpreters: nothing is forked from a process that has threads (torch, gloo, a
progress bar), and a script of the user's own is not imported again.
"""

import gc
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bigtune.data.recipe import Recipe
from bigtune.errors import DataError
from bigtune.process import end_with_parent

_recipes: dict[str, Recipe] = {}  # of a worker process, by the file that brought them

T = TypeVar("T")


class Pool(Protocol):
    """Runs `function(recipe, *arguments)`, now or in a worker process."""

    @property
    def recipe(self) -> Recipe: ...

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]: ...


@contextmanager
def open_pool(workers: int, recipe: Recipe | Callable[[], Recipe]) -> Iterator[Pool]:
    """Some worker processes; with no workers, this process. They end with this process, however it ends.

    A recipe that is still to be made is made in a worker, which has a tokenizer sooner than this process: see `_begin`.
    """
    if not workers:
        yield _Here(recipe if isinstance(recipe, Recipe) else recipe())
        return
    from loky import ProcessPoolExecutor

    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    executor = ProcessPoolExecutor(workers, initializer=_begin, env=environment)
    try:
        for _ in range(workers - 1):
            executor.submit(_warm_up)
        here = recipe if isinstance(recipe, Recipe) else result_of(executor.submit(recipe))
        with ExitStack() as resources:
            try:  # it is read once by each worker
                file = resources.enter_context(tempfile.NamedTemporaryFile(prefix="bigtune-recipe-"))
                pickle.dump(here, file)
                file.flush()
            except OSError as error:
                where, reason = tempfile.gettempdir(), os.strerror(error.errno or 0)
                raise DataError(f"{where}: cannot be written ({reason}); make room, or set TMPDIR") from None
            yield _Processes(here, executor, file.name)
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def result_of(future: Future[T]) -> T:
    """What a worker made.

    Raises:
        DataError: as the function raised it, or a worker was killed.
    """
    with _telling_of_a_kill():
        return future.result()


@contextmanager
def _telling_of_a_kill() -> Iterator[None]:
    from loky.process_executor import BrokenProcessPool

    try:
        yield
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized was killed (out of memory?); lower data.workers and run the command again: "
            "what is finished is kept"
        ) from None


@dataclass(frozen=True)
class _Here:
    recipe: Recipe

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(function(self.recipe, *arguments))
        return done


@dataclass(frozen=True)
class _Processes:
    recipe: Recipe
    executor: Any
    file: str

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        with _telling_of_a_kill():
            future: Future[T] = self.executor.submit(_run, self.file, function, *arguments)
        return future


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()
    # transformers imports torch where it finds it, which takes seconds; tokenizers and templates need none of it.
    sys.modules["torch"] = None  # type: ignore[assignment]


def _warm_up() -> None:
    """Import what is needed, while the last worker makes the recipe."""
    import transformers.utils.chat_template_utils  # noqa: F401

    import bigtune.data.parts  # noqa: F401


def _run(file: str, function: Callable[..., T], *arguments: Any) -> T:
    if file not in _recipes:
        _recipes[file] = pickle.loads(Path(file).read_bytes())
        gc.freeze()  # what is there stays: to look through it again and again takes 5% of the time
    return function(_recipes[file], *arguments)
