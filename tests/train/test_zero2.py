"""ZeRO-2 keeps what ZeRO-3 keeps: gradients by rule 1, float32 sums, and the weights that come of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtune.config import Optim
from bigtune.data.collate import collate
from bigtune.data.deal import deal
from bigtune.dist import World
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_run
from tests.train.test_loss import WEIGHTED, Gradients, reference_gradients, worst


def stepped(
    folder: Path, preset: str, precision: str, steps: int, without: str = "", rule: str = "global"
) -> tuple[Gradients, list[float]]:
    """After so many steps on one global batch: the next one's gradients, or the masters, and the norms of the steps.

    Args:
        without: a key of DeepSpeed's configuration that is left out.
        rule: "micro" counts micro-steps in, as a mean of means would.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    world = World.from_environment()
    run = tiny_run(folder, optim__max_grad_norm=0.5 if steps else 0.0)
    config = complete(read_preset(preset), run, precision, 36)
    config.pop(without, None)
    config["zero_optimization"] |= {"reduce_bucket_size": 5000}  # several buckets, and parameters larger than one
    engine = Engine(folder, Optim(name="sgd", learning_rate=0.1), config, precision, world)
    work, supervised = (np.array([getattr(row, load) for row in WEIGHTED]) for load in ("work", "supervised"))
    slots = deal(work, supervised, world.data_world, micro_batch=1, global_batch=4)
    batches = [collate([WEIGHTED[i] for i in micro_step if i >= 0]) for micro_step in slots[world.data_rank]]
    weight = collate(WEIGHTED).weight * (len(batches) if rule == "micro" else 1)

    def accumulate() -> None:
        for index, batch in enumerate(batches):
            engine.micro_step(batch, weight, 1, last=index == len(batches) - 1)

    norms = []
    for _ in range(steps):
        accumulate()
        assert engine.step(0.1)
        norms.append(engine.grad_norm)
    read: Any = safe_get_full_fp32_param if steps else safe_get_full_grad
    if not steps:
        accumulate()
    return {name: read(p).float().numpy().copy() for name, p in engine.parameters.items()}, norms


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_do_not_depend_on_ranks_and_accumulation(folder: Path, ranks: int) -> None:
    """1 × 4, 2 × 2 and 3 ranks × 2 micro-steps, the last with empty rows."""
    reference = reference_gradients(folder, WEIGHTED)
    for gradients, _ in run_distributed(stepped, ranks, folder, "zero2", "float32", 0):
        assert worst(gradients, reference) < 1e-5


def test_a_mean_of_means_would_fail(folder: Path) -> None:
    gradients, _ = run_distributed(stepped, 2, folder, "zero2", "float32", 0, "", "micro")[0]
    assert worst(gradients, reference_gradients(folder, WEIGHTED)) > 0.1


def test_under_bfloat16_sums_over_micro_steps_and_ranks_are_float32(folder: Path) -> None:
    """The gradients of a micro-batch have 8 bits, whoever computes it; so 1 × 4 and 4 × 1 differ by their sums alone.
    The mutation: summed in bfloat16 they differ."""
    one, four, mutated = (
        run_distributed(stepped, ranks, folder, "zero2", "bfloat16", 0, without)[0][0]
        for ranks, without in ((1, ""), (4, ""), (1, "data_types"))
    )
    assert worst(one, four) < 1e-6
    assert worst(mutated, four) > 1e-4
    assert worst(one, reference_gradients(folder, WEIGHTED)) < 5e-2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_and_norms_are_those_of_zero3(folder: Path, precision: str) -> None:
    """Three clipped steps with momentum, which shows a wrong scale; in float32 also those of one rank."""
    (wanted, norms) = run_distributed(stepped, 2, folder, "zero3", precision, 3)[0]
    for ranks in (2, 1) if precision == "float32" else (2,):
        found, found_norms = run_distributed(stepped, ranks, folder, "zero2", precision, 3)[0]
        assert found_norms == pytest.approx(norms, rel=1e-5)
        assert max(norms) > 0.5  # so that it is clipped
        assert worst(found, wanted) < 1e-5
