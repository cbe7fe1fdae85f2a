"""Worker processes that read and tokenise.

loky starts them as fresh interpreters: nothing is forked from a process that has threads (torch, gloo, a
progress bar), and a script of the user's own is not imported again.
"""

import pickle
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bigtune.data.parts import Recipe
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
def open_pool(workers: int, make_recipe: Callable[[], Recipe]) -> Iterator[Pool]:
    """Some worker processes; with no workers, this process. They end with this process, however it ends.

    Workers start and import what they need while this process makes the recipe, which takes as long: loading a
    tokenizer imports torch.
    """
    if not workers:
        yield _Here(make_recipe())
        return
    from loky import ProcessPoolExecutor

    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    executor = ProcessPoolExecutor(workers, initializer=_begin, env=environment)
    try:
        for _ in range(workers):
            executor.submit(_warm_up)
        with tempfile.NamedTemporaryFile(prefix="bigtune-recipe-") as file:  # it is read once by each worker
            recipe = make_recipe()
            pickle.dump(recipe, file)
            file.flush()
            yield _Processes(recipe, executor, file.name)
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
        future: Future[T] = self.executor.submit(_run, self.file, function, *arguments)
        return future


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()


def _warm_up() -> None:
    """Import what rendering needs. That this module is imported has brought the rest."""
    import transformers.utils.chat_template_utils  # noqa: F401


def _run(file: str, function: Callable[..., T], *arguments: Any) -> T:
    if file not in _recipes:
        _recipes[file] = pickle.loads(Path(file).read_bytes())
    return function(_recipes[file], *arguments)
