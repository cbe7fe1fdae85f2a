"""One rank of bigtune with one of its measures taken away, so that what it gives has a number.

deepspeed --num_accelerators N bigtune_rank.py MEASURE RUN.yaml
"""

import sys
from functools import partial
from typing import Any
from unittest import mock

MEASURES = ("head", "attention", "sharing", "optimizer", "allocator", "binding")


def nothing(*_: Any) -> None:
    """In place of what takes a measure."""


def take_away(measure: str) -> None:
    """Before the worker imports what it uses; torch may come in only where cores and threads are set before."""
    if measure == "binding":
        mock.patch("bigtune.train.cores.bind", nothing).start()
    elif measure == "allocator":
        mock.patch("bigtune.train.cores.keep_memory", nothing).start()
    else:
        from bigtune.dist import World
        from bigtune.train.cores import bind

        bind(World.from_environment())
        from bigtune.train import engine

        if measure == "head":  # transformers' own full logits, and then the supervised ones
            mock.patch("bigtune.train.objective.replace_head", nothing).start()
        elif measure == "attention":  # transformers' sdpa, with a mask of the whole row
            mock.patch("bigtune.model.attention.NAME", "sdpa").start()
        elif measure == "sharing":  # DeepSpeed's own gathering and reducing, over gloo
            mock.patch("bigtune.train.whole.Wholes.of", nothing).start()
        elif measure == "optimizer":  # several passes over the partitions
            import torch

            build = engine.build_optimizer
            plain = partial(torch.optim.AdamW, fused=False)
            mock.patch.object(engine, "build_optimizer", lambda groups, optim, _: build(groups, optim, plain)).start()


if __name__ == "__main__":
    rank, measure, run_file = sys.argv[1:]
    take_away(measure)
    sys.argv = ["bigtune.train", rank, run_file]
    from bigtune.train.__main__ import main

    main()
