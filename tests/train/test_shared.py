"""Ranks of one host share memory: what goes that way is what DeepSpeed's own collectives would have given."""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import distributed

from bigtune.config import Optim
from bigtune.data.collate import collate
from bigtune.dist import World
from bigtune.errors import TrainError
from bigtune.train import reduce as reduce_module
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.reduce import Reducer
from bigtune.train.shared import share
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_run
from tests.train.test_loss import WEIGHTED, Gradients
from tests.training import memory

# ------------------------------------------------------------------------------------------------ memory


def write_and_read(size: int, world: World | None = None) -> list[int] | None:
    me = World.from_environment()
    shared = share(size, world or me)
    if shared is None:
        return None
    assert shared.dtype == torch.uint8 and len(shared) == size and not shared.any()
    distributed.barrier()
    shared[me.rank] = 10 + me.rank
    distributed.barrier()
    return shared[: me.world_size].tolist()


@pytest.mark.parametrize("size", [4, 5000, 2**21 + 1])
def test_what_one_rank_writes_all_see(size: int) -> None:
    assert run_distributed(write_and_read, 4, size) == [[10, 11, 12, 13]] * 4


def test_ranks_of_several_hosts_share_nothing() -> None:
    assert run_distributed(write_and_read, 2, 100, World(world_size=2, local_size=1)) == [None, None]


def not_on_the_last(number: str, *rest: Any) -> int:
    if os.environ["RANK"] == "1" and str(number).startswith("/proc/"):
        raise FileNotFoundError(number)  # as in a container of its own
    return REAL_OPEN(number, *rest)


REAL_OPEN = os.open


def share_with_one_apart() -> bool:
    with mock.patch("os.open", not_on_the_last):
        return share(100, World.from_environment()) is None


def test_if_one_cannot_see_it_none_uses_it() -> None:
    assert run_distributed(share_with_one_apart, 2) == [True, True]


def test_nothing_is_left_behind() -> None:
    before = set(Path("/dev/shm").iterdir())
    run_distributed(write_and_read, 2, 2**20)
    assert set(Path("/dev/shm").iterdir()) <= before


# ------------------------------------------------------------------------------------------------ training


def steps_on_rank(
    folder: Path, precision: str, shared: bool, rows: int = 4, mutation: str = "", clip: float = 0.0
) -> tuple[Gradients, float]:
    """The parameters after three steps, a row a micro-step, and the last gradient's norm."""
    from deepspeed.utils import safe_get_full_fp32_param

    world = World.from_environment()
    ds_config = complete(read_preset("zero3"), tiny_run(folder, optim__max_grad_norm=clip), precision, 36)
    with memory(shared), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce_module, "TURN", 300)  # most parameters take several
        patch.setattr(reduce_module, "BUCKET", 2000)
        if mutation:
            MUTATIONS[mutation](patch)
        engine = Engine(folder, Optim(learning_rate=0.01), ds_config, precision, world)
        whole = collate(WEIGHTED[:rows])
        mine = [collate(WEIGHTED[i : i + 1]) for i in range(world.rank, rows, world.world_size)]
        mine += [collate([])] * (-(-rows // world.world_size) - len(mine))
        for _ in range(3):
            for index, batch in enumerate(mine):
                engine.micro_step(batch, whole.weight, whole.tokens, last=index == len(mine) - 1)
            engine.step(0.01)
    return {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in engine.parameters.items()}, engine.grad_norm


def both(ranks: int, folder: Path, precision: str = "float32", *rest: Any) -> tuple[Gradients, Gradients]:
    """By DeepSpeed's own collectives, and in shared memory; the norms are the same but for rounding."""
    (wanted, norm), *_ = run_distributed(steps_on_rank, ranks, folder, precision, False, *rest)
    results = run_distributed(steps_on_rank, ranks, folder, precision, True, *rest)
    found, other_norm = results[-1]
    assert wanted.keys() == found.keys()
    assert math.isclose(norm, other_norm, rel_tol=1e-5) and norm > 0.1
    assert all(np.array_equal(one[name], found[name]) for one, _ in results for name in found)
    return wanted, found


def close(wanted: Gradients, found: Gradients) -> bool:
    return all(np.allclose(found[name], wanted[name], rtol=0, atol=1e-5) for name in wanted)


@pytest.mark.parametrize(
    ("ranks", "precision"), [*((ranks, "float32") for ranks in (1, 2, 3, 4)), (1, "bfloat16"), (2, "bfloat16")]
)
def test_steps_are_those_of_deepspeed_but_for_rounding(tmp_path: Path, ranks: int, precision: str) -> None:
    assert close(*both(ranks, tiny_llama(tmp_path, tied=True), precision))


def test_and_clipped_ones(tmp_path: Path) -> None:
    assert close(*both(2, tiny_llama(tmp_path), "float32", 4, "", 0.01))


def _one_turn_late(patch: pytest.MonkeyPatch) -> None:
    write = Reducer._write

    def late(self: Reducer, turn: list[Any], stage: torch.Tensor) -> None:
        write(self, turn, stage) if self._turns % 2 else None

    patch.setattr(Reducer, "_write", late)


def _without_its_own(patch: pytest.MonkeyPatch) -> None:
    add = Reducer._sum

    def others(self: Reducer, parameter: Any, parts: list[torch.Tensor], *stretch: Any) -> None:
        parts[self._world.rank] = torch.zeros_like(parts[self._world.rank])
        add(self, parameter, parts, *stretch)

    patch.setattr(Reducer, "_sum", others)


def _first_micro_step_alone(patch: pytest.MonkeyPatch) -> None:
    add = Reducer._sum

    def fresh(self: Reducer, parameter: Any, *rest: Any) -> None:
        self._fresh.add(parameter.ds_id)
        add(self, parameter, *rest)

    patch.setattr(Reducer, "_sum", fresh)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "one turn late": _one_turn_late,
    "without its own": _without_its_own,
    "the last micro-step alone": _first_micro_step_alone,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_summed_wrong_would_be_seen(tmp_path: Path, mutation: str) -> None:
    folder = tiny_llama(tmp_path)
    (wanted, _), *_ = run_distributed(steps_on_rank, 2, folder, "float32", False)
    (found, _), *_ = run_distributed(steps_on_rank, 2, folder, "float32", True, 4, mutation)
    assert not close(wanted, found)


def norms_on_rank(folder: Path) -> list[float]:
    """Of a step, and of one whose micro-batches use no parameter."""
    world = World.from_environment()
    ds_config = complete(read_preset("zero3"), tiny_run(folder, optim__max_grad_norm=0.0), "float32", 36)
    engine, norms = Engine(folder, Optim(), ds_config, "float32", world), []
    for used in (True, False):
        with nullcontext() if used else mock.patch.object(engine._optimizer, ADD, lambda p: setattr(p, "grad", None)):
            engine.micro_step(collate(WEIGHTED[:1]), 1.0, 1, last=True)
        engine.step(0.0)
        norms.append(engine.grad_norm)
    return norms


def other_parameters_on_rank(folder: Path) -> str:
    world = World.from_environment()
    ds_config = complete(read_preset("zero3"), tiny_run(folder, optim__max_grad_norm=0.0), "float32", 36)
    engine = Engine(folder, Optim(), ds_config, "float32", world)
    add = getattr(engine._optimizer, ADD)

    def without_norms(parameter: Any) -> None:
        if world.rank == 0 or len(parameter.ds_shape) > 1:
            add(parameter)

    setattr(engine._optimizer, ADD, without_norms)
    with pytest.raises(TrainError) as raised:
        engine.micro_step(collate(WEIGHTED[:1]), 1.0, 1, last=True)
    return str(raised.value)


def test_ranks_with_gradients_of_other_parameters_are_stopped(tmp_path: Path) -> None:
    """Else one would add up what does not belong together."""
    for said in run_distributed(other_parameters_on_rank, 2, tiny_llama(tmp_path)):
        assert said.startswith("the ranks have gradients of other parameters")


ADD = "reduce_independent_p_g_buckets_and_remove_grads"
"""DeepSpeed's name for what takes a parameter's gradient."""


def test_a_parameter_that_no_micro_batch_used_has_no_gradient_of_an_older_step(tmp_path: Path) -> None:
    for first, second in run_distributed(norms_on_rank, 2, tiny_llama(tmp_path)):
        assert first > 0.0
        assert second == 0.0
