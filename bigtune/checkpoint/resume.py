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
        CheckpointError: parameters laid out in another way (as on another number of ranks), or a broken file.
    """
    saved = Layout.read(checkpoint)
    saved_places, live_places = ([part.parameters for part in layout.sub_groups] for layout in (saved, live))
    if saved.world_size != live.world_size or saved_places != live_places:
        raise CheckpointError(
            f"{checkpoint}: its parameters are laid out in another way than the model's; "
            "the model, the optimizer's groups, the DeepSpeed preset or the ranks have changed since"
        )
    path = rank_file(checkpoint, rank, saved.world_size)
    try:
        with safe_open(path, framework="pt") as file:
            for part in saved.sub_groups:
                kinds = (MASTER, *part.states)
                yield {kind: file.get_tensor(f"{part.index}.{kind}") for kind in kinds}, part.scalars
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}; resume from another step") from None
