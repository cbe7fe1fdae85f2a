"""Put a checkpoint back into a live engine, to the last bit."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bigtune import dist
from bigtune.checkpoint.layout import MASTER, Layout, rank_file
from bigtune.dist import World
from bigtune.errors import CheckpointError
from bigtune.train.engine import Engine
from bigtune.train.optim import import_state


def resume(folder: Path, engine: Engine, world: World) -> None:
    """Overwrite this rank's partitions and optimizer states with those of a checkpoint, collectively.

    Raises:
        CheckpointError: on every rank; another number of ranks, another model, or a broken file.
    """
    problem = ""
    try:
        _restore(folder, engine, world)
    except CheckpointError as error:
        problem = str(error)
    except (OSError, SafetensorError) as error:
        problem = f"{rank_file(folder, world.rank, world.world_size)}: {error}"
    problems = [text for text in dist.gather(problem) if text]
    if problems:
        raise CheckpointError(problems[0])
    engine.refresh()


def _restore(folder: Path, engine: Engine, world: World) -> None:
    saved = Layout.read(folder)
    if saved.world_size != world.world_size:
        raise CheckpointError(
            f"{folder}: written by {saved.world_size} ranks; resuming on {world.world_size} is not supported yet; "
            f"start with --ranks {saved.world_size}"
        )
    live = list(engine.sub_groups())
    here = [[(p.name, p.shape, p.offset, p.length) for p in part.places] for part in live]
    there = [[(p.name, p.shape, p.offset, p.length) for p in part.parameters] for part in saved.sub_groups]
    if here != there:
        raise CheckpointError(
            f"{folder}: its parameters are laid out in another way than the model's; "
            "the model, the optimizer's groups or the DeepSpeed preset have changed since"
        )
    with safe_open(rank_file(folder, world.rank, world.world_size), framework="pt") as file:
        for part, description in zip(live, saved.sub_groups, strict=True):
            part.master.data.copy_(file.get_tensor(f"{part.index}.{MASTER}"))
            tensors = {kind: file.get_tensor(f"{part.index}.{kind}") for kind in description.states}
            import_state(engine.base_optimizer, part.master, tensors, description.scalars)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of a checkpoint's small files.

    Raises:
        CheckpointError: it is missing or broken.
    """
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name}: cannot be read ({error}); resume from another step") from None
