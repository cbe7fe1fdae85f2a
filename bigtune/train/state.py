"""A live engine's state as a checkpoint holds it: who holds which elements, this rank's tensors, and the way back."""

from pathlib import Path

import torch

from bigtune import dist
from bigtune.checkpoint.layout import MASTER, Layout, State, SubGroup
from bigtune.checkpoint.resume import read_partitions
from bigtune.errors import CheckpointError
from bigtune.train.engine import Engine
from bigtune.train.optim import BLOCK, export_state, import_state


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
                states={kind: _description(kind, tensor) for kind, tensor in states.items()},
                scalars=scalars,
            )
        )
    return Layout(engine.world.world_size, engine.dtype, tuple(sub_groups), engine.tied, engine.joined), tensors


def restore(engine: Engine, checkpoint: Path) -> None:
    """Overwrite this rank's partitions and optimizer states with those of a checkpoint, collectively.

    Raises:
        CheckpointError: on every rank; another number of ranks, another model, or a broken file.
    """

    def overwrite() -> None:
        live, _ = collect(engine)
        saved = read_partitions(checkpoint, engine.world.rank, live)
        for part, (tensors, scalars) in zip(engine.partitions(), saved, strict=True):
            part.master.data.copy_(tensors.pop(MASTER))
            import_state(engine.base_optimizer, part.master, tensors, scalars)

    problem = dist.first_problem(overwrite, CheckpointError)
    if problem:
        raise CheckpointError(problem.text)
    engine.refresh()


def _description(kind: str, tensor: torch.Tensor) -> State:
    return State(str(tensor.dtype).removeprefix("torch."), BLOCK if kind.startswith("absmax") else 1)
