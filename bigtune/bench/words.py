"""What the terminal and the page say alike."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigtune.bench.result import BUSY, Result
from bigtune.bench.sweep import MICRO_BATCH
from bigtune.runfile import to_line


def settings_told(result: Result) -> str:
    """What a case differs in from the run file: `train.micro_batch=max (4) deepspeed=zero3`."""
    case = result.case
    found = f" ({result.micro_batch})" if case.searches and result.micro_batch else ""
    told = [f"{key}={to_line(value)}{found * (key == MICRO_BATCH)}" for key, value in case.settings.items()]
    return " ".join(told) or "as the run file"


def hardware_told(results: Sequence[Result]) -> Iterator[str]:
    """What ran the cases, and with which versions."""
    if not results:
        return
    host: Mapping[str, Any] = results[0].machine
    devices = f"{host['gpus']} × {host['gpu']}, " if host.get("gpu") else ""
    yield f"{devices}{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB"
    versions = ", ".join(f"{name} {host[name]}" for name in ("bigtune", "torch", "deepspeed", "transformers", "python"))
    yield versions + (
        f", commit {host['commit'][:12]}{'-dirty' * host['commit'].endswith('-dirty')}" if host["commit"] else ""
    )
    precisions = sorted({result.precision for result in results if result.precision})
    if precisions:
        yield f"computed in {' and '.join(precisions)}"


def caveats(results: Sequence[Result]) -> Iterator[str]:
    """What to know before the figures are believed."""
    measured = [result for result in results if result.figures]
    if any(result.scaling_efficiency is not None for result in measured):
        shared = "" if results[0].machine.get("gpu") else "; without GPUs the ranks share the host's cores"
        yield f"scaling: tokens/s a device beside those on the fewest ranks, at the same global batch{shared}"
    for note in dict.fromkeys(result.note for result in measured if result.note):
        yield f"warning: {note}"
    busy = [result for result in measured if (result.busy_by_others or 0) > BUSY]
    if busy:
        most = max(result.busy_by_others or 0 for result in busy)
        yield (
            f"warning: other processes used up to {most:.0%} of the cores during {len(busy)} of {len(measured)} cases; "
            "measure again on a quiet machine"
        )
    if any(result.figures and "forward" not in result.figures.phases for result in measured):
        yield "the phases of a step were not timed by this version's runs"
