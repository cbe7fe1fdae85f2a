"""Who this process is among the workers, and the few reductions that they share.

`World` is plain data and needs no torch; the functions below it do. A launcher (DeepSpeed's, torchrun, …)
describes the world in the environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE or LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_own_groups: dict[int, Any] = {}
JOB = "BIGTUNE_JOB"
"""Names a launch, by which a run's lock knows that another host's was the same run's before it started again."""
CHILD = "BIGTUNE_CHILD"
"""Tells workers that `bigtune train` started them: it has prepared their documents and shows their errors."""


@dataclass(frozen=True, slots=True)
class World:
    """One worker's place. Data ranks equal ranks as long as every rank computes rows of its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read the launcher's variables; without any, this is the only worker."""

        def number(*names: str, default: int) -> int:
            return next((int(environment[name]) for name in names if name in environment), default)

        world_size = number("WORLD_SIZE", default=1)
        return cls(
            rank=number("RANK", default=0),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", default=0),
            local_size=number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size),
            node=number("CROSS_RANK", "GROUP_RANK", default=0),
        )

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of a global batch this worker computes."""
        return self.rank

    @property
    def data_world(self) -> int:
        """Over how many workers a global batch is dealt."""
        return self.world_size


def all_sum(values: Sequence[float], group: Any = None) -> list[float]:
    """Sum numbers over all ranks, in float64: exact for counts up to 2^53."""
    from torch import distributed

    return _reduced(values, distributed.ReduceOp.SUM, group)


def all_max(value: float) -> float:
    """The largest of the ranks' numbers, on every rank."""
    from torch import distributed

    return _reduced([value], distributed.ReduceOp.MAX)[0]


def _reduced(values: Sequence[float], operation: Any, group: Any = None) -> list[float]:
    import torch
    from torch import distributed

    where = device() if group is None else torch.device("cpu")  # groups of our own are gloo's
    tensor = torch.tensor(list(values), dtype=torch.float64, device=where)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor, operation, group)
    return [float(value) for value in tensor.tolist()]


def from_main(value: float) -> float:
    """Rank 0's number, on every rank."""
    from torch import distributed

    main = not distributed.is_initialized() or distributed.get_rank() == 0
    return all_sum([value if main else 0.0])[0]


def from_main_text(text: str, group: Any = None) -> str:
    """Rank 0's text, on every rank."""
    return gather(text, group)[0]


def device() -> torch.device:
    """The device of this worker: its GPU where CUDA works, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def own_group() -> Any:
    """A group of all ranks over gloo, for what runs beside the training; made collectively."""
    from torch import distributed

    if not distributed.is_initialized():
        return None
    world = distributed.group.WORLD
    if id(world) not in _own_groups:
        _own_groups[id(world)] = distributed.new_group(backend="gloo")
    return _own_groups[id(world)]


def gather(mine: T, group: Any = None) -> list[T]:
    """Every rank's value, on every rank; small ones that can be pickled."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [mine]
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, mine, group)
    return told


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong on one rank."""

    rank: int
    text: str


def first_problem(action: Callable[[], None], *kinds: type[Exception], group: Any = None) -> Problem | None:
    """Run an action that may fail on some ranks only, collectively.

    Returns:
        On every rank the same: what the lowest rank says that failed with one of `kinds`, or None.
    """
    mine = None
    try:
        action()
    except kinds as error:
        mine = str(error)
    said = gather(mine, group)
    return next((Problem(rank, text) for rank, text in enumerate(said) if text is not None), None)
