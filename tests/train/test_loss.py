"""Rule 1: the gradient of a global batch is that of its weighted loss over its summed weight,
for any ranks, accumulation and packing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bigtune.config import Optim
from bigtune.data.collate import collate
from bigtune.data.deal import deal
from bigtune.data.document import Document
from bigtune.data.rows import Row
from bigtune.dist import World
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.stores import document
from tests.tiny import VOCABULARY, tiny_llama, tiny_run
from tests.training import memory

Gradients = dict[str, npt.NDArray[np.float32]]
Rule = Literal["global", "mean of means", "count"]


def random_rows(weights: Sequence[float]) -> list[Row]:
    """Rows with 31, 0, 3 and 11 supervised tokens, in two spans where there are enough; weights go round."""
    random = np.random.default_rng(0)
    given = 0

    def of(length: int, supervised: int) -> Document:
        nonlocal given
        middle = length - supervised // 2
        spans = [span for span in ((length - supervised, middle), (middle, length)) if span[0] < span[1]]
        chosen = [weights[(given + i) % len(weights)] for i in range(len(spans))]
        given += len(spans)
        return document(random.integers(2, VOCABULARY, length).tolist(), *spans, weights=chosen)

    rows = [[(40, 30), (9, 1)], [(12, 0), (5, 0), (7, 0)], [(50, 3)], [(11, 4), (20, 4), (8, 3)]]
    return [Row(tuple(range(len(row))), tuple(of(*one) for one in row)) for row in rows]


ALIKE, WEIGHTED, DOUBLED = random_rows([1.0]), random_rows([0.3, 1.0, 2.0]), random_rows([2.0])


def zero3_gradients(folder: Path, precision: str, threshold: int | None, rule: Rule, rows: list[Row]) -> Gradients:
    """Full gradients of one global batch, before any optimizer step; called on each rank.

    `threshold` is DeepSpeed's size of parameters that stay gathered, on ranks that share no memory; None if they do.
    """
    from deepspeed.utils import safe_get_full_grad

    world = World.from_environment()
    preset = read_preset("zero3")
    if threshold is not None:
        preset["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    run = tiny_run(folder, optim__max_grad_norm=0.0)
    with memory(shared=threshold is None):
        engine = Engine(folder, Optim(), complete(preset, run, precision, 36), precision, world)
    work, supervised = (np.array([getattr(row, load) for row in rows]) for load in ("work", "supervised"))
    slots = deal(work, supervised, world.data_world, micro_batch=1, global_batch=4)
    batches = [collate([rows[i] for i in micro_step if i >= 0]) for micro_step in slots[world.data_rank]]
    whole = collate(rows)
    for index, batch in enumerate(batches):
        mean = (batch.weight or 1.0) * len(batches) * world.world_size
        weight = {"global": whole.weight, "mean of means": mean, "count": whole.supervised}[rule]
        engine.micro_step(batch, weight, whole.tokens, last=index == len(batches) - 1)
    return {name: safe_get_full_grad(p).float().cpu().numpy().copy() for name, p in engine.parameters.items()}


def reference_gradients(folder: Path, rows: list[Row]) -> Gradients:
    """The same from transformers alone: one document at a time, full logits, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    learn_each_alone(model, rows)
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def learn_each_alone(model: Any, rows: list[Row]) -> None:
    """The gradient of the rows' loss into a model of transformers: a document at a time, full logits."""
    documents = [one for row in rows for one in row.documents]
    total = sum(float(weight) * int(end - start) for d in documents for (start, end), weight in spans_of(d))
    for one in documents:
        ids = torch.from_numpy(one.input_ids).long()
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        parts = [weight * losses[start - 1 : end - 1].sum() for (start, end), weight in spans_of(one)]
        (sum(parts, losses.sum() * 0.0) / total).backward()


def spans_of(one: Document) -> list[tuple[Any, float]]:
    return list(zip(one.spans.tolist(), one.weights.tolist(), strict=True))


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
@pytest.mark.parametrize(("threshold", "rows"), [(0, WEIGHTED), (100_000, ALIKE), (None, WEIGHTED)])
def test_gradients_do_not_depend_on_ranks_and_accumulation(
    folder: Path, ranks: int, threshold: int | None, rows: list[Row]
) -> None:
    results = run_distributed(zero3_gradients, ranks, folder, "float32", threshold, "global", rows)
    reference = reference_gradients(folder, rows)
    for gradients in results:
        assert worst(gradients, reference) < 1e-5


def test_weights_of_two_everywhere_are_weights_of_one(folder: Path) -> None:
    one, two = (
        run_distributed(zero3_gradients, 2, folder, "float32", 0, "global", rows)[0] for rows in (ALIKE, DOUBLED)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_mean_per_micro_batch_would_fail(folder: Path) -> None:
    """The mutation: what peers do must not pass for what rule 1 asks."""
    gradients = run_distributed(zero3_gradients, 2, folder, "float32", 0, "mean of means", WEIGHTED)[0]
    assert worst(gradients, reference_gradients(folder, WEIGHTED)) > 0.1


def test_a_plain_count_or_forgotten_weights_would_fail(folder: Path) -> None:
    """The same for weights that only one side of the division knows, or neither."""
    reference = reference_gradients(folder, WEIGHTED)
    for rule, rows in (("count", WEIGHTED), ("global", ALIKE)):
        gradients = run_distributed(zero3_gradients, 2, folder, "float32", 0, rule, rows)[0]
        assert worst(gradients, reference) > 0.1


def test_bfloat16_stays_within_its_own_bound(folder: Path) -> None:
    """Activations have 8 bits of mantissa; the sums over micro-steps and ranks are float32."""
    reference = reference_gradients(folder, WEIGHTED)
    for ranks in (1, 2):
        gradients = run_distributed(zero3_gradients, ranks, folder, "bfloat16", 0, "global", WEIGHTED)[0]
        assert worst(gradients, reference) < 5e-2
