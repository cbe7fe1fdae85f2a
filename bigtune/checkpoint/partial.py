"""A model's folder while it is written: what is finished stays when a merge is killed, and the next one goes on.

    models/gsm8k.partial/
      model-00001-of-00003.safetensors
      manifest.json                      the files that are finished and on the disk, with their checksums

The manifest's id says what the files are made of. It is written anew with each file that is finished, and is the
model's own at the end, when the folder gets its name.
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from bigtune.checkpoint.check import Progress, find_problems
from bigtune.checkpoint.folder import PARTIAL, sync
from bigtune.checkpoint.manifest import FILE, Manifest
from bigtune.errors import CheckpointError
from bigtune.tensorfile import Sums, sums_of

NEXT = "next"
"""The folder in which the next manifest is written."""


class Partial:
    """The folder beside an output, from when it is locked until it is left."""

    def __init__(self, output: Path, made_of: str) -> None:
        self.output, self.made_of = output, made_of
        self.folder = output.with_name(output.name + PARTIAL)
        self.finished: dict[str, Sums] = {}
        self._lock = threading.Lock()
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Make the folder, and keep others out of it.

        Raises:
            CheckpointError: another process writes there.
            OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise CheckpointError(
                f"{self.folder}: another merge writes there; wait for it, or give another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what is finished, and nothing else."""
        if kind is not None and self.folder.is_dir():
            self._clear()
            if not self.finished:
                shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._descriptor)

    def keep_finished(self, workers: int | None = None, progress: Progress | None = None) -> None:
        """Find what a merge of the same left whole, and remove all else."""
        try:
            manifest = Manifest.read(self.folder)
        except CheckpointError:  # none, or damaged: nothing is trusted
            manifest = Manifest("", {})
        if manifest.id == self.made_of:
            used = {name: tuple(sums.tensors) for name, sums in manifest.files.items()}
            broken = {problem.file for problem in find_problems(self.folder, manifest, used, workers, progress)}
            self.finished = {name: sums for name, sums in manifest.files.items() if name not in broken}
        self._clear()

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in self.finished and (path.name != FILE or not self.finished):
                path.unlink(missing_ok=True)

    def add(self, name: str, sums: Sums) -> None:
        """Record a file that is finished and on the disk. Threads may call it at once."""
        with self._lock:
            self.finished[name] = sums
            self._record()

    def complete(self, texts: Mapping[str, bytes], order: Iterable[str]) -> None:
        """Write the small files, and give the folder its name.

        Args:
            texts: by their paths in the folder.
            order: of the files in the manifest, before the small ones.
        """
        small = dict[str, Sums]()
        for name, content in texts.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sync(path)
            small[name] = sums_of(path)
        self.finished = {name: self.finished[name] for name in order} | small
        self._record()
        (self.folder / NEXT).rmdir()
        sync(self.folder)
        self.folder.rename(self.output)  # over an empty one
        sync(self.output.parent)

    def _record(self) -> None:
        scratch = self.folder / NEXT
        scratch.mkdir(exist_ok=True)
        Manifest(self.made_of, self.finished).write(scratch)
        (scratch / FILE).replace(self.folder / FILE)
        sync(self.folder)
