"""Rule 1: the gradient of a global batch is that of its summed loss over its count of supervised tokens,
for any ranks, accumulation and packing."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bigtune.config import Optim
from bigtune.data.stream import Row, collate, deal
from bigtune.dist import World
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import random_rows, tiny_llama, tiny_run

# Very unequal: 31, 0, 3 and 11 supervised tokens; the second row has none at all.
ROWS = random_rows([[30, 1], [0, 0, 0], [3], [4, 4, 3]], [[40, 9], [12, 5, 7], [50], [11, 20, 8]])
Gradients = dict[str, npt.NDArray[np.float32]]


def zero3_gradients(
    folder: Path, precision: str, threshold: int, rule: Literal["global", "mean of means"]
) -> Gradients | None:
    """Full gradients of one global batch, before any optimizer step; called on each rank."""
    from deepspeed.utils import safe_get_full_grad

    world = World.from_environment()
    preset = read_preset("zero3")
    preset["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    run = tiny_run(folder, optim__max_grad_norm=0.0)
    engine = Engine(folder, Optim(), complete(preset, run, precision, 36), precision, world)
    batches = [collate(rows) for rows in deal(ROWS, world.data_rank, world.data_world, 1, 4)]
    total = sum(collate([row]).supervised for row in ROWS)
    for index, batch in enumerate(batches):
        count = total if rule == "global" else max(1, batch.supervised) * len(batches) * world.world_size
        engine.micro_step(batch, count, last=index == len(batches) - 1)
    return {name: safe_get_full_grad(p).float().numpy().copy() for name, p in engine.parameters.items()}


def reference_gradients(folder: Path) -> Gradients:
    """The same from transformers alone: one document at a time, full logits, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = sum(collate([row]).supervised for row in ROWS)
    for row in ROWS:
        for document in row.documents:
            batch = collate([Row((0,), (document,))])
            logits = model(torch.from_numpy(batch.input_ids)[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[batch.predict_at], torch.from_numpy(batch.targets), reduction="sum"
            )
            (loss / total).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def worst(gradients: Gradients, reference: Gradients) -> float:
    """The largest relative error of any parameter's gradient."""
    assert gradients.keys() == reference.keys()
    return max(
        float(np.linalg.norm(gradients[name] - wanted) / np.linalg.norm(wanted)) for name, wanted in reference.items()
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0, 100_000])
def test_gradients_do_not_depend_on_ranks_and_accumulation(folder: Path, ranks: int, threshold: int) -> None:
    results = run_distributed(zero3_gradients, ranks, folder, "float32", threshold, "global")
    reference = reference_gradients(folder)
    for gradients in results:
        assert worst(gradients, reference) < 1e-5


def test_a_mean_per_micro_batch_would_fail(folder: Path) -> None:
    """The mutation: what peers do must not pass for what rule 1 asks."""
    gradients = run_distributed(zero3_gradients, 2, folder, "float32", 0, "mean of means")[0]
    assert worst(gradients, reference_gradients(folder)) > 0.1


def test_bfloat16_stays_within_its_own_bound(folder: Path) -> None:
    """Activations have 8 bits of mantissa; the sums over micro-steps and ranks are float32."""
    reference = reference_gradients(folder)
    for ranks in (1, 2):
        gradients: Any = run_distributed(zero3_gradients, ranks, folder, "bfloat16", 0, "global")[0]
        assert worst(gradients, reference) < 5e-2
