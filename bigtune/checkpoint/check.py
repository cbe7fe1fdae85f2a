"""Files of a folder against the sizes and checksums of its manifest, by threads. Needs no torch."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from bigtune.checkpoint.manifest import Manifest, missing_or_cut
from bigtune.tensorfile import BrokenFileError, Place, checksum_of, read_header

MOST_WORKERS = 8
"""Each holds a piece of 16 MiB, and disks are no faster for more."""
MIB = 2**20

Progress = Callable[[int, int, str], None]
"""Called with MiB done, MiB in all, and what is done; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one file, by its path in the folder."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def find_problems(
    folder: Path,
    manifest: Manifest,
    used: Mapping[str, Sequence[str]],
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Read files of a folder against its manifest.

    Args:
        used: by file the tensors that matter, with its header; none for a file that is no safetensors file, or has no
            tensors: then all its bytes do.
    """
    seen = missing_or_cut(folder, manifest, used)
    problems = [Finding(name, what) for name, what in seen.items()]
    parts = list[_Part]()
    for name in used:
        if name not in seen:
            try:
                parts += _parts(folder, manifest, name, used[name])
            except (OSError, BrokenFileError) as error:
                problems.append(Finding(name, f"cannot be read ({error})"))
    total, done = sum(part.place.nbytes for part in parts), 0
    with ThreadPoolExecutor(min(workers or cores(), MOST_WORKERS)) as pool:
        try:
            for part, problem in zip(parts, pool.map(_problem_of, parts), strict=True):
                problems += [Finding(part.file, problem)] if problem else []
                done += part.place.nbytes
                if progress:
                    progress(done // MIB, total // MIB, "MiB checked")
        finally:  # where `progress` raises, the rest is not read
            pool.shutdown(wait=False, cancel_futures=True)
    return problems


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a file: bytes with a checksum of their own, and what is said where it differs."""

    file: str
    place: Place
    checksum: str
    problem: str


def _parts(folder: Path, manifest: Manifest, name: str, tensors: Sequence[str]) -> Iterator[_Part]:
    path, wanted = folder / name, manifest.files[name]
    if not tensors:
        yield _Part(name, _bytes(path, wanted.size), wanted.checksum, "is damaged, or was edited")
        return
    places, _, start = read_header(path)
    with path.open("rb") as file:
        if xxhash.xxh3_128_hexdigest(file.read(start)) != wanted.checksum or places.keys() != wanted.tensors.keys():
            raise BrokenFileError("its header is damaged")
    for tensor in tensors:
        yield _Part(name, places[tensor], wanted.tensors[tensor], f"is damaged in tensor {tensor}")


def _bytes(path: Path, count: int) -> Place:
    return Place(path, 0, (count,), "U8")


def _problem_of(part: _Part) -> str | None:
    try:
        return None if checksum_of(part.place) == part.checksum else part.problem
    except (OSError, BrokenFileError) as error:
        return f"cannot be read ({error})"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
