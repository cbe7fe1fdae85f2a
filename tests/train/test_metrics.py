"""metrics.jsonl: whole lines of strict JSON, one a step, whatever interrupted the run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bigtune.data.collate import collate
from bigtune.data.rows import Row
from bigtune.dist import World
from bigtune.train.metrics import Flags, MetricsLog, Totals, reduce_totals
from tests.stores import document

ALONE = {"least": 0.5, "median": 0.5, "most": 0.5, "slowest_rank": 0}


def lines(path: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl", time.monotonic())


def hold(log: MetricsLog, step: int, loss_sum: float, weight: float = 4.0, **more: Any) -> None:
    log.hold(loss_sum, weight, 0.5, step=step, loss=None, **more)


def test_a_line_is_written_once_its_loss_is_known(log: MetricsLog, tmp_path: Path) -> None:
    hold(log, 1, 8.0)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert log.held == [8.0, 0.0, 0.5]
    log.complete([10.0, 0.0, 0.5])  # with the other ranks' 2.0
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "rank_seconds": ALONE}]
    assert log.held == [0.0, 0.0, 0.0]
    log.complete([10.0, 0.0, 0.5])  # nothing is held any more
    hold(log, 2, 3.0)
    log.flush()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert lines(tmp_path / "metrics.jsonl")[1]["loss"] == 0.75


def test_a_loss_is_divided_by_the_weight_of_its_own_step(log: MetricsLog, tmp_path: Path) -> None:
    hold(log, 1, 3.0, weight=0.5)
    log.complete([3.0, 0.0, 0.5])
    hold(log, 2, 3.0, weight=12.0)
    log.complete([3.0, 0.0, 0.5])
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [6.0, 0.25]


def test_one_reduction_sums_a_step_with_the_loss_held_from_the_last() -> None:
    rows = [
        Row((0, 1), (document(range(10), (7, 10)), document(range(20), (18, 20), weights=[2.0]))),
        Row((2,), (document(range(30), (26, 30), weights=[0.5]),)),
    ]
    batches = [collate([row]) for row in rows] + [collate([])]
    assert reduce_totals(batches, Flags(), held=[7.5, 0.5]) == Totals(9, 9.0, 60, Flags(), [7.5, 0.5])
    for asked in (Flags(stop=True), Flags(save=True), Flags(failed=True)):
        assert reduce_totals(batches[1:], asked, held=[0.0]) == Totals(4, 2.0, 30, asked, [0.0])
    assert reduce_totals([], Flags(), held=[]) == Totals(0, 0.0, 0, Flags(), [])


def test_a_straggler_is_named_among_any_number_of_ranks(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", time.monotonic(), World(rank=2, world_size=4))
    log.hold(3.0, 2.0, 0.7, step=1)
    assert log.held == [3.0, 0.0, 0.0, 0.0, 0.7, 0.0]
    log.complete([4.0, 0.0, 0.3, 0.5, 0.7, 9.0])
    spread = {"least": 0.3, "median": 0.6, "most": 9.0, "slowest_rank": 3}
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "rank_seconds": spread}]


def test_the_loss_of_routers_is_a_mean_over_tokens(log: MetricsLog, tmp_path: Path) -> None:
    log.hold(8.0, 4.0, 0.5, 6.0, step=1, tokens=12)
    assert log.held == [8.0, 6.0, 0.5]
    log.complete([8.0, 9.0, 0.5])  # with those of other ranks
    line = lines(tmp_path / "metrics.jsonl")[0]
    assert (line["loss"], line["router_aux_loss"]) == (2.0, 0.75)


def test_a_step_without_supervised_tokens_has_a_loss_of_zero(log: MetricsLog, tmp_path: Path) -> None:
    hold(log, 1, 0.0, weight=0.0)
    log.complete([0.0, 0.0, 0.5])
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == 0.0


def test_nan_and_infinity_become_null(log: MetricsLog, tmp_path: Path) -> None:
    hold(log, 1, 1.0, grad_norm=float("inf"), tokens=3)
    log.complete([float("nan"), 0.0, 0.5])
    line = lines(tmp_path / "metrics.jsonl")[0]
    assert (line["loss"], line["grad_norm"], line["tokens"]) == (None, None, 3)


def test_other_ranks_write_nothing_but_know_the_last_loss(tmp_path: Path) -> None:
    log = MetricsLog(None, time.monotonic())
    hold(log, 1, 2.0)
    log.complete([4.0, 0.0, 0.5])
    log.forget_after(0)
    assert log.last["loss"] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_drops_later_lines_and_those_that_a_kill_cut_off(log: MetricsLog, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (1, 2, 3, 4)]
    path.write_text("".join(whole) + '{"step": 2, "lo')
    log.forget_after(2)
    assert path.read_text() == "".join(whole[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.forget_after(0)
    assert path.read_text() == ""


def test_forgetting_needs_no_file(log: MetricsLog, tmp_path: Path) -> None:
    log.forget_after(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("junk", ["3\n", "null\n", "[]\n", '{"step": null}\n', "{}\n", "\n"])
def test_a_line_that_is_no_metrics_line_is_dropped(log: MetricsLog, tmp_path: Path, junk: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(junk + '{"step": 1}\n')
    log.forget_after(1)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
