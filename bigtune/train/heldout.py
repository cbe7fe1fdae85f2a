"""The loss of held-out rows, on all ranks, while a run trains."""

from collections.abc import Sequence

import torch

from bigtune import dist
from bigtune.data.collate import collate
from bigtune.data.rows import Row
from bigtune.train.engine import Engine


def held_out_loss(engine: Engine, rows: Sequence[Row], micro_batch: int) -> float:
    """Mean cross-entropy of the supervised tokens, by weight, in nats; the same on every rank. Collectively.

    Ranks that get fewer rows compute empty ones, so that all take part in every collective.
    """
    world = engine.world
    mine = rows[world.data_rank :: world.data_world]
    most = -(-len(rows) // world.data_world)
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for start in range(0, most, micro_batch):
        batch = collate(mine[start : start + micro_batch])
        total += engine.cross_entropy(batch).double().cpu()
        weight += batch.weight
    summed, weight = dist.all_sum([float(total), weight])
    return summed / weight
