"""The folder of a run's checkpoints: names, the pointer `latest`, and what makes a change in it lasting.

checkpoints/
  step-20/  step-40/     whole ones
  step-60.partial/       one that is being written, or the remains of a save that was killed
  latest                 the name of the step that the run goes on from
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bigtune.errors import CheckpointError

PARTIAL = ".partial"
LATEST = "latest"


def rank_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file that one rank writes."""
    return folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return checkpoints / f"step-{step}"


def steps_in(checkpoints: Path) -> dict[int, Path]:
    """The folders of checkpoints by step, in order."""
    found = {path.name.removeprefix("step-"): path for path in checkpoints.glob("step-*")}
    return dict(sorted((int(name), path) for name, path in found.items() if name.isdigit()))


def read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    """One of a checkpoint's small files.

    Raises:
        CheckpointError: it is missing or broken.
    """
    try:
        value = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / name}: cannot be read ({error}); resume from another step") from None


def to_json(value: object) -> str:
    """Readable JSON, ending in a newline."""
    return json.dumps(value, indent=1) + "\n"


def latest_step(checkpoints: Path) -> int | None:
    """The step that `latest` names; None without one.

    Raises:
        CheckpointError: it names no step.
    """
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return None
    text = pointer.read_bytes().decode("utf-8", "replace").strip()
    number = text.removeprefix("step-")
    if not (text.startswith("step-") and number.isdecimal()):
        raise CheckpointError(f"{pointer}: names {text[:40]!r}, which is no step; write a name such as step-20 in it")
    return int(number)


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names; None without one.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    step = latest_step(checkpoints)
    if step is None:
        return None
    folder = step_folder(checkpoints, step)
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoints / LATEST}: names {folder.name}, which is not there; write another step's name in it"
        )
    return folder


def point_at(folder: Path) -> None:
    """Make a step's folder the one that `latest` names, in one step, on the disk."""
    pointer, text = folder.parent / LATEST, folder.name + "\n"
    if pointer.is_file() and pointer.read_bytes() == text.encode():
        return
    aside = pointer.with_name(LATEST + PARTIAL)
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(pointer)
    sync(folder.parent)


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename a folder that is whole to its name; one that has the name is out of the way first, and then removed."""
    replaced = folder.with_name(f"{folder.name}.replaced{PARTIAL}")
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint: renamed first, so that what is left of it when that is interrupted is none."""
    aside = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # what a slow file system keeps goes at the next start


def clear_remains(checkpoints: Path) -> list[str]:
    """Remove what saves that were killed left behind; the names of it."""
    remains = sorted(checkpoints.glob(f"*{PARTIAL}"))
    for path in remains:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in remains]


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
