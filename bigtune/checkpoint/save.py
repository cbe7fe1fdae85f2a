"""Write a checkpoint: aside, checked, renamed, and only then `latest`.

Each rank writes its own file and nothing is gathered. Whatever fails, on whichever rank, every rank learns
of it, the remains are removed and the checkpoint before stays the latest.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bigtune import dist
from bigtune.checkpoint import layout
from bigtune.checkpoint.layout import MASTER, Layout, Parameter, State, SubGroup, rank_file, step_folder
from bigtune.dist import World
from bigtune.errors import CheckpointError
from bigtune.train.engine import Engine
from bigtune.train.optim import BLOCK, export_state


def save(
    checkpoints: Path,
    step: int,
    engine: Engine,
    world: World,
    texts: Mapping[str, str],
    model_files: Mapping[str, Path | str],
) -> Path:
    """Save all ranks' partitions as step-N, collectively.

    Args:
        texts: small files by name, such as trainer.json.
        model_files: what makes a model of the weights, by name: a file to copy, or its text.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write; names the rank and its reason.
    """
    folder = step_folder(checkpoints, step)
    aside = folder.with_name(folder.name + ".partial")
    _together(world, aside, lambda: _start(aside) if world.is_main else None)
    tensors, description = _collect(engine, world)
    _together(world, aside, lambda: _write_rank(aside, world, tensors))
    shared = (aside, description, texts, model_files)
    _together(world, aside, lambda: _write_shared(*shared) if world.is_main else None)
    _together(world, aside, lambda: _publish(aside, folder, description) if world.is_main else None)
    return folder


def _together(world: World, aside: Path, action: Any) -> None:
    """Run an action on this rank; raise on all ranks if it failed on any, with the remains removed."""
    problem = ""
    try:
        action()
    except (OSError, SafetensorError, CheckpointError) as error:
        problem = f"rank {world.rank}: {error}"
    problems = [text for text in dist.gather(problem) if text]
    if problems:
        free = shutil.disk_usage(aside.parent).free / 2**30 if aside.parent.is_dir() else 0.0
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{aside.with_suffix('')}: could not be saved ({problems[0]}; {free:.2f} GiB free); "
            "the checkpoint before stays the latest; make room and start again to go on from it"
        )


def _start(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _collect(engine: Engine, world: World) -> tuple[dict[str, torch.Tensor], Layout]:
    """This rank's tensors, and the layout that all ranks share."""
    tensors: dict[str, torch.Tensor] = {}
    sub_groups = []
    for part in engine.sub_groups():
        states, scalars = export_state(part.state)
        tensors[f"{part.index}.{MASTER}"] = part.master.detach()
        tensors |= {f"{part.index}.{kind}": tensor for kind, tensor in states.items()}
        sub_groups.append(
            SubGroup(
                index=part.index,
                group=part.group["name"],
                numel=part.master.numel(),
                parameters=tuple(Parameter(p.name, p.shape, p.offset, p.length) for p in part.places),
                states={
                    kind: State(str(tensor.dtype).removeprefix("torch."), BLOCK if kind.startswith("absmax") else 1)
                    for kind, tensor in states.items()
                },
                scalars=scalars,
            )
        )
    return tensors, Layout(world.world_size, engine.dtype, tuple(sub_groups), engine.tied)


def _write_rank(aside: Path, world: World, tensors: dict[str, torch.Tensor]) -> None:
    path = rank_file(aside, world.rank, world.world_size)
    save_file(tensors, path)
    _sync(path)


def _write_shared(
    aside: Path, description: Layout, texts: Mapping[str, str], model_files: Mapping[str, Path | str]
) -> None:
    description.write(aside)
    for name, text in texts.items():
        (aside / name).write_text(text, encoding="utf-8")
    (aside / "model").mkdir()
    for name, content in model_files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, aside / "model" / name)
        else:
            (aside / "model" / name).write_text(content, encoding="utf-8")
    for path in aside.rglob("*.json"):
        _sync(path)


def _publish(aside: Path, folder: Path, description: Layout) -> None:
    """Check that every rank's file holds what the layout says, then make it the latest."""
    wanted = {
        f"{sub_group.index}.{kind}" for sub_group in description.sub_groups for kind in (MASTER, *sub_group.states)
    }
    for rank in range(description.world_size):
        path = rank_file(aside, rank, description.world_size)
        with safe_open(path, framework="pt") as file:  # refuses a file that is not as long as its header says
            if set(file.keys()) != wanted:
                raise CheckpointError(f"{path.name} does not hold what the layout says")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    pointer = folder.parent / "latest"
    pointer.with_suffix(".new").write_text(folder.name + "\n", encoding="utf-8")
    pointer.with_suffix(".new").replace(pointer)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints; called by rank 0 after a save."""
    steps = sorted(
        (int(path.name.removeprefix("step-")), path)
        for path in checkpoints.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and (path / layout.FILE).is_file()
    )
    for _, path in steps[:-keep_last]:
        shutil.rmtree(path)


def to_json(value: Mapping[str, Any]) -> str:
    """Readable JSON, ending in a newline."""
    return json.dumps(value, indent=1) + "\n"
