"""A live engine's state as a checkpoint holds it: who holds which elements, this rank's tensors, and the way back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.checkpoint.disks import Disks, bring
from bigtune.checkpoint.layout import MASTER, Layout, State, SubGroup
from bigtune.checkpoint.resume import Saved
from bigtune.errors import CheckpointError
from bigtune.train.engine import Engine
from bigtune.train.optim import BLOCK, code_books, export_state, import_state


def collect(engine: Engine) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The layout, the same on every rank, and this rank's tensors by the names they have in its file.

    The tensors are the engine's own: whoever keeps them longer than until the next step must copy them.
    """
    tensors: dict[str, torch.Tensor] = {}
    sub_groups = []
    for part in engine.partitions():
        states, scalars = export_state(part.state)
        tensors[f"{part.index}.{MASTER}"] = part.master.detach()
        tensors |= {f"{part.index}.{kind}": tensor for kind, tensor in states.items()}
        sub_groups.append(
            SubGroup(
                index=part.index,
                group=part.group["name"],
                numel=part.master.numel(),
                parameters=part.parameters,
                states=_described(states),
                scalars=scalars,
            )
        )
    return Layout(engine.world.world_size, engine.dtype, tuple(sub_groups), engine.tied, engine.joined), tensors


def restore(engine: Engine, checkpoint: Path, disks: Disks, group: Any) -> int:
    """Overwrite this rank's partitions and optimizer states with those of a checkpoint, collectively.

    Returns:
        Bytes that had to come from other hosts.

    Raises:
        CheckpointError: on every rank; another model, another optimizer, or a broken file.
    """
    saved: list[Saved] = []
    parts = list(engine.partitions())

    def compare() -> None:
        live, _ = collect(engine)
        saved.append(Saved(checkpoint, live, engine.world.rank))

    def overwrite() -> None:
        (source,) = saved
        books = code_books(engine.base_optimizer)
        for part, described in zip(parts, source.live.sub_groups, strict=True):
            states, scalars = source.read(described, part.master.data, books)
            import_state(engine.base_optimizer, part.master, states, scalars)

    _together(compare, group)
    moved = 0
    if not disks.shared:
        needed = dict(enumerate(dist.gather(saved[0].files_needed(), group)))
        moved = bring(checkpoint, needed, disks, engine.world, group)
    _together(overwrite, group)
    engine.refresh()
    return moved


def _together(action: Any, group: Any) -> None:
    problem = dist.first_problem(action, CheckpointError, group=group)
    if problem:
        raise CheckpointError(problem.text)


def _described(tensors: Mapping[str, torch.Tensor]) -> dict[str, State]:
    return {kind: _description(kind, tensor, tensors) for kind, tensor in sorted(tensors.items())}


def _description(kind: str, tensor: torch.Tensor, others: Mapping[str, torch.Tensor]) -> State:
    scales = f"absmax{kind[-1]}"  # bitsandbytes' name for those of state1 and state2
    return State(
        str(tensor.dtype).removeprefix("torch."),
        BLOCK if kind.startswith("absmax") else 1,
        scales if tensor.dtype == torch.uint8 and scales in others else None,
    )
