"""Write a checkpoint: aside, checked, renamed, and only then `latest`.

Each rank writes its own file and nothing is gathered. Whatever fails, on whichever rank, every rank learns
of it, the remains are removed and the checkpoint before stays the latest.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bigtune import dist
from bigtune.checkpoint.layout import MASTER, Layout, point_at, rank_file, step_folder, sync
from bigtune.errors import CheckpointError


def save(
    checkpoints: Path,
    step: int,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    texts: Mapping[str, str],
    model_files: Mapping[str, bytes],
) -> Path:
    """Save all ranks' partitions as step-N, collectively.

    Args:
        layout: who holds which elements, the same on every rank.
        tensors: this rank's, by the names that they have in its file.
        texts: small files by name, such as trainer.json.
        model_files: what makes a model of the weights, by name: config, tokenizer and their like; rank 0's count.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write; names the rank and its reason.
    """
    folder = step_folder(checkpoints, step)
    aside = folder.with_name(folder.name + ".partial")

    def together(action: Callable[[], None], main_only: bool = True) -> None:
        problem = dist.first_problem(
            action if rank == 0 or not main_only else _nothing, OSError, SafetensorError, CheckpointError
        )
        if problem:
            raise _given_up(aside, problem, is_main=rank == 0)

    together(lambda: _start(aside))
    together(lambda: _write_rank(rank_file(aside, rank, layout.world_size), tensors), main_only=False)
    together(lambda: _write_shared(aside, layout, texts, model_files))
    together(lambda: _publish(aside, folder, layout))
    return folder


def _nothing() -> None:
    """The part of the other ranks where rank 0 alone acts."""


def _given_up(aside: Path, problem: dist.Problem, is_main: bool) -> CheckpointError:
    """Remove what was written, and say why it came to nothing."""
    free = shutil.disk_usage(aside.parent).free / 2**30 if aside.parent.is_dir() else 0.0
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
    return CheckpointError(
        f"{aside.with_suffix('')}: could not be saved (rank {problem.rank}: {problem.text}; {free:.2f} GiB free); "
        "the checkpoint before stays the latest; make room and start again to go on from it"
    )


def _start(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _write_rank(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), path)
    sync(path)


def _write_shared(aside: Path, layout: Layout, texts: Mapping[str, str], model_files: Mapping[str, bytes]) -> None:
    layout.write(aside)
    for name, text in texts.items():
        (aside / name).write_text(text, encoding="utf-8")
    (aside / "model").mkdir()
    for name, content in model_files.items():
        (aside / "model" / name).write_bytes(content)
    for path in aside.rglob("*.json"):
        sync(path)


def _publish(aside: Path, folder: Path, layout: Layout) -> None:
    """Check that every rank's file holds what the layout says, then make it the latest."""
    wanted = {f"{part.index}.{kind}" for part in layout.sub_groups for kind in (MASTER, *part.states)}
    for rank in range(layout.world_size):
        path = rank_file(aside, rank, layout.world_size)
        with safe_open(path, framework="pt") as file:  # refuses a file that is not as long as its header says
            if set(file.keys()) != wanted:
                raise CheckpointError(f"{path.name} does not hold what the layout says")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    point_at(folder)


def prune(checkpoints: Path, step: int, keep_last: int) -> None:
    """Remove the checkpoints before `step`, which was just saved, but for the newest; called by rank 0.

    Later ones are of a run that went back: they stay until they are written anew.
    """
    steps = sorted(
        (number, path)
        for path in checkpoints.glob("step-*")
        if (name := path.name.removeprefix("step-")).isdigit() and (number := int(name)) <= step
    )
    for _, path in steps[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)  # what a slow file system keeps goes with the next


def to_json(value: Mapping[str, Any]) -> str:
    """Readable JSON, ending in a newline."""
    return json.dumps(value, indent=1) + "\n"
