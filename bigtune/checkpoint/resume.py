"""Read one rank's part of a checkpoint back, once it is known to fit."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bigtune.checkpoint.layout import MASTER, Layout, rank_file
from bigtune.errors import CheckpointError


def read_partitions(
    checkpoint: Path, rank: int, live: Layout
) -> Iterator[tuple[dict[str, torch.Tensor], Mapping[str, float]]]:
    """Tensors by kind, and the states' scalars, of each sub-group of `live`; one sub-group is in memory at a time.

    Raises:
        CheckpointError: another number of ranks, parameters laid out in another way, or a broken file.
    """
    saved = Layout.read(checkpoint)
    if saved.world_size != live.world_size:
        raise CheckpointError(
            f"{checkpoint}: written by {saved.world_size} ranks; resuming on {live.world_size} is not supported yet; "
            f"start with --ranks {saved.world_size}"
        )
    if [part.parameters for part in saved.sub_groups] != [part.parameters for part in live.sub_groups]:
        raise CheckpointError(
            f"{checkpoint}: its parameters are laid out in another way than the model's; "
            "the model, the optimizer's groups or the DeepSpeed preset have changed since"
        )
    path = rank_file(checkpoint, rank, saved.world_size)
    try:
        with safe_open(path, framework="pt") as file:
            for part in saved.sub_groups:
                kinds = (MASTER, *part.states)
                yield {kind: file.get_tensor(f"{part.index}.{kind}") for kind in kinds}, part.scalars
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}; resume from another step") from None
