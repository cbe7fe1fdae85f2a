"""Lines of metrics.jsonl, and results, made by hand."""

from typing import Any

from bigtune.bench.figures import Figures
from bigtune.bench.result import Result
from bigtune.bench.sweep import Case

HOST = {
    "cpu": "A", "cores": 2, "cpu_bfloat16": [], "memory_gib": 8.0, "gpu": None, "gpus": 0, "python": "3.12",
    "bigtune": "0.1", "torch": "2", "deepspeed": "0.19", "transformers": "5", "commit": "a" * 40,
}  # fmt: skip


def line(step: int, time: float, tokens: int = 100, supervised: int = 40, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "time": time, "step_seconds": 0.5, "data_seconds": 0.1, "tokens": tokens,
        "supervised_tokens": supervised, "peak_memory_gib": 1.0 + step / 10,
        "rank_seconds": {"least": 0.1, "median": 0.2, "most": 0.3, "slowest_rank": 1},
    } | more  # fmt: skip


def lines(**more: Any) -> list[dict[str, Any]]:
    """Two steps of warm-up, which end at 3 and 5 seconds, and four more."""
    ends = (3.0, 5.0, 6.0, 8.0, 9.0, 10.0)
    made = [line(step, end, 100 * step, 40 * step, **more) for step, end in enumerate(ends, 1)]
    made[0]["memory_gib"] = {"parameters": 0.5, "activations": 0.25}
    return made


def result(speed: float = 1.0, noise: float = 0.01, ranks: int = 1, **more: Any) -> Result:
    """Of 20 steps of 1,000 tokens, `speed` times as fast as a second each, give or take the noise."""
    seconds = [(1 + noise * (-1) ** step) / speed for step in range(21)]
    ends = [sum(seconds[: step + 1]) for step in range(21)]
    figures = Figures.of([line(step, end, 1000) for step, end in enumerate(ends)], 1, ranks)
    settings = more.pop("settings", {"train.micro_batch": 1})
    return Result(Case(settings, ranks), figures=figures, machine=HOST, **more)
