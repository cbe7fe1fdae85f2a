"""Read a checkpoint or a merged model again, and tell what in it is not what was written. Needs no torch.

manifest.json ─▶ is each file there and as long as it was? ─▶ header and tensors, by threads, against checksums
"""

import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtune.checkpoint import deepspeed
from bigtune.checkpoint.check import Finding, Progress, find_problems
from bigtune.checkpoint.folder import LATEST, PARTIAL, latest, steps_in
from bigtune.checkpoint.manifest import FILE, Manifest
from bigtune.checkpoint.zerofiles import STATES
from bigtune.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong in a folder, what is only worth a note, and how much of it was looked at."""

    problems: Sequence[Finding]
    notes: Sequence[Finding]
    files: int
    size: int
    tensors: int

    @property
    def whole(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        """One line."""
        if self.problems:
            count = len(self.problems)
            return f"not whole: {count:,} {'problem' if count == 1 else 'problems'} in {self.files:,} files"
        return f"whole: {self.files:,} files, {self.size / 2**30:.1f} GiB, {self.tensors:,} tensors"

    def to_json(self) -> dict[str, Any]:
        return {"whole": self.whole, **asdict(self)}


def verify(path: Path, workers: int | None = None, progress: Progress | None = None) -> Verdict:
    """Read all of a checkpoint or a merged model; of DeepSpeed's checkpoints what merging reads, against the CRCs that
    they have.

    Args:
        path: a step-N folder or a merged model's; of a `checkpoints` folder, or a run's output folder, all its steps.
        workers: threads that read; None for one a core.

    Raises:
        CheckpointError: there is nothing there that has checksums.
    """
    if (path / FILE).is_file():
        return _verify_folder(path, "", workers, progress)
    for checkpoints in (path, path / "checkpoints"):
        steps = steps_in(checkpoints)
        if steps:
            return _verify_steps(checkpoints, steps.values(), workers, progress)
    theirs = deepspeed.find(path)
    if theirs is not None:
        return _verify_deepspeed(theirs, progress)
    raise CheckpointError(
        f"{path.absolute()}: no {FILE} and no checkpoints; give a step-N folder, a run's output folder or a merged "
        "model's"
    )


def _verify_deepspeed(folder: Path, progress: Progress | None) -> Verdict:
    source = deepspeed.of_deepspeed(folder)
    problems = deepspeed.find_problems(folder, progress)
    files = list(folder.glob(STATES))
    return Verdict(problems, [], len(files), sum(path.stat().st_size for path in files), len(source.tensors))


def _verify_steps(
    checkpoints: Path, folders: Iterable[Path], workers: int | None, progress: Progress | None
) -> Verdict:
    problems, notes = list[Finding](), list[Finding]()
    files = size = tensors = 0
    try:
        if latest(checkpoints) is None:
            problems.append(Finding(LATEST, "is missing, so that no run goes on from here; write a step's name in it"))
    except CheckpointError as error:
        problems.append(Finding(LATEST, str(error).removeprefix(f"{checkpoints / LATEST}: ")))
    for folder in folders:
        try:
            found = _verify_folder(folder, f"{folder.name}/", workers, progress)
        except CheckpointError as error:
            problems.append(Finding(f"{folder.name}/{FILE}", str(error).removeprefix(f"{folder / FILE}: ")))
            continue
        problems += found.problems
        notes += found.notes
        files, size, tensors = files + found.files, size + found.size, tensors + found.tensors
    notes += [Finding(path.name, "is what a save that was killed left") for path in checkpoints.glob(f"*{PARTIAL}")]
    return Verdict(problems, notes, files, size, tensors)


def _verify_folder(folder: Path, prefix: str, workers: int | None, progress: Progress | None) -> Verdict:
    """Args:
    prefix: of the files' names in what is told.
    """
    manifest = Manifest.read(folder)
    elsewhere = _of_other_hosts(folder, manifest)
    used = {name: tuple(sums.tensors) for name, sums in manifest.files.items() if name not in elsewhere}
    problems = find_problems(folder, manifest, used, workers, progress)
    broken = {problem.file for problem in problems}
    problems += [problem for problem in _wrong_index(folder, manifest) if problem.file not in broken]
    known = {*manifest.files, FILE}
    strange = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    notes = [Finding(name, f"is on host {host} alone") for name, host in elsewhere.items()]
    notes += [Finding(name, "is not in the manifest") for name in sorted(strange) if name not in known]
    return Verdict(
        [Finding(prefix + problem.file, problem.what) for problem in problems],
        [Finding(prefix + note.file, note.what) for note in notes],
        len(used),
        sum(manifest.files[name].size for name in used),
        sum(map(len, used.values())),
    )


def _of_other_hosts(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Files that are not here and need not be, where hosts do not share a disk: the host that has each, by file."""
    here = socket.gethostname()
    mine = {name for host, names in manifest.disks.items() if host.split(" (rank ")[0] == here for name in names}
    return {
        name: host
        for host, names in manifest.disks.items()
        for name in names
        if name not in mine and not (folder / name).exists()
    }


def _wrong_index(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Where the index of a merged model names other tensors, or other files of them, than there are."""
    if INDEX not in manifest.files:
        return
    try:
        named: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
        held = {tensor: name for name, sums in manifest.files.items() for tensor in sums.tensors}
        differing = sorted(tensor for tensor in {*named, *held} if named.get(tensor) != held.get(tensor))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(INDEX, f"cannot be read ({error!r})")
        return
    for tensor in differing:
        if tensor not in held:
            yield Finding(INDEX, f"names tensor {tensor}, which is in no file")
        else:
            yield Finding(INDEX, f"has tensor {tensor} in {named.get(tensor, 'no file')}; it is in {held[tensor]}")
