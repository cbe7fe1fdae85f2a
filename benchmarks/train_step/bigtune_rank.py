"""One rank of bigtune with one of its measures taken away, so that what it gives has a number.

deepspeed --num_accelerators N bigtune_rank.py MEASURE RUN.yaml
"""

import functools
import sys
from typing import Any
from unittest import mock

MEASURES = ("head", "attention", "sharing", "optimizer", "allocator", "binding")


def nothing(*_: Any) -> None:
    """In place of a function that takes the measure."""


def take_away(measure: str) -> None:
    """Must come before the worker has imported what it patches."""
    if measure == "binding":
        mock.patch("bigtune.train.cores.bind", nothing).start()
        return
    if measure == "allocator":
        mock.patch("bigtune.train.cores.keep_memory", nothing).start()
        return
    from bigtune.dist import World
    from bigtune.train.cores import bind

    bind(World.from_environment())
    if measure == "head":  # transformers' own full logits, of the supervised positions alone
        mock.patch("bigtune.train.objective.replace_head", nothing).start()
    elif measure == "sharing":  # DeepSpeed's own gathering and reducing, over gloo
        mock.patch("bigtune.train.whole.Wholes.of", nothing).start()
    elif measure == "optimizer":
        import torch

        plain = functools.partial(torch.optim.AdamW)

        def slow(groups: Any, **settings: Any) -> Any:
            return plain(groups, **{**settings, "fused": False})

        mock.patch("torch.optim.AdamW", slow).start()
    elif measure == "attention":  # transformers' sdpa, with a mask of the whole row
        mock.patch("bigtune.model.attention.NAME", "sdpa").start()


if __name__ == "__main__":
    rank, measure, run_file = sys.argv[1:]
    take_away(measure)
    sys.argv = ["bigtune.train", rank, run_file]
    from bigtune.train.__main__ import main

    main()
