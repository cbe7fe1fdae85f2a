"""Memory by kind is what tensors hold, and where it does not suffice one line says what would."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtune.model.head import LossHead
from bigtune.train.engine import Engine
from bigtune.train.memory import distinct_bytes, to_text
from tests.distributed import run_distributed
from tests.tiny import tiny_run
from tests.training import train, train_on_rank

REAL_FORWARD, REAL_STEP = LossHead.forward, Engine.step


def test_memory_that_tensors_share_is_counted_once() -> None:
    whole = torch.zeros(100)
    seen: set[int] = set()
    assert distinct_bytes([whole, whole[10:20], torch.zeros(3), torch.empty(0)], seen) == 412
    assert distinct_bytes([whole.view(10, 10)], seen) == 0
    assert to_text({"parameters": 512, "gradients": 3 * 2**29}) == "parameters 0.5 KiB, gradients 1.50 GiB"


def test_the_first_step_tells_bytes_by_kind(made: Path, tmp_path: Path) -> None:
    run = tiny_run(made, output=str(tmp_path), optim__name="adamw", data__store=str(made / "store"), train__steps=2)
    train(run)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "memory_gib" not in second
    held = {kind: round(gib * 2**30) for kind, gib in first["memory_gib"].items()}
    elements = json.loads((tmp_path / "checkpoints" / "step-2" / "layout.json").read_text())["sub_groups"]
    mine = 4 * sum(group["numel"] for group in elements)
    gib = 2**30 * 1e-6  # what rounding takes
    assert held["optimizer"] == pytest.approx(3 * mine, abs=gib)  # masters and two moments
    assert held["gradients"] == pytest.approx(mine, abs=gib)
    assert mine < held["parameters"] < 4 * mine  # the partition, small ones whole, the buffers
    assert held["activations"] > 0
    assert re.search(
        r"^memory of a rank: parameters .*, activations ", (tmp_path / "logs" / "rank-0.log").read_text(), re.M
    )


def greedy_forward(head: LossHead, *inputs: Any) -> Any:
    torch.empty(2**50)
    return REAL_FORWARD(head, *inputs)


def greedy_step(engine: Engine, rate: float) -> bool:
    torch.empty(2**50)
    return REAL_STEP(engine, rate)


@pytest.mark.parametrize(
    ("micro_batch", "mend"), [(2, r"train\.micro_batch: 1 would fit"), (1, r"data\.sequence_length: \d\d would fit")]
)
def test_a_micro_batch_that_does_not_fit_says_what_would(
    made: Path, tmp_path: Path, micro_batch: int, mend: str
) -> None:
    settings: dict[str, Any] = {"data__store": str(made / "store"), "train__micro_batch": micro_batch}
    run = tiny_run(made, output=str(tmp_path), **settings)
    (told,) = run_distributed(
        train_on_rank, 1, run, None, None, False, {"bigtune.model.head.LossHead.forward": greedy_forward}
    )
    assert "\n" not in told
    assert re.match(
        rf"TrainError: out of memory with train\.micro_batch {micro_batch}, at 9\d% of the forward pass", told
    )
    assert re.search(rf"\(parameters .* gradients .* optimizer .*\); by what was measured {mend}; or set train", told)


def test_memory_that_the_optimizer_lacks_is_another_line(made: Path, tmp_path: Path) -> None:
    run = tiny_run(made, output=str(tmp_path), data__store=str(made / "store"))
    (told,) = run_distributed(
        train_on_rank, 1, run, None, None, False, {"bigtune.train.engine.Engine.step": greedy_step}
    )
    assert told.startswith("TrainError: out of memory in the optimizer step (parameters ")
    assert told.endswith("use more ranks, optim.name: adamw_8bit, or deepspeed: zero3_offload")
