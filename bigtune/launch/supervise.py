"""A run from its first attempt to its end: what failed is kept and told, and the hosts that are left go on.

The global batch needs no fixed number of ranks, and a checkpoint none either, so that a run goes on without a host that
failed twice or cannot be reached. What would fail again, a mistake in the run file or the data, is not tried again.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigtune.errors import LaunchError
from bigtune.launch.attempt import Command, End, Ending, attempt
from bigtune.launch.fleet import Fleet
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.plan import Plan

MOST_FAILURES = 2
"""Of one host, after which it is left out."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """Whether and how a run is started again.

    Args:
        most: so many times at most.
        latest: the step of the latest checkpoint, as hosts see it; while it is the same, a restart goes on from where
            the user said at first.
    """

    most: int
    latest: Callable[[Sequence[Host]], int | None]


def supervise(
    fleet: Fleet,
    hosts: Sequence[Host],
    plan: Callable[[Sequence[Host]], Plan],
    command: Command,
    interrupts: Interrupts,
    restarts: Restarts,
    every_rank: bool = False,
) -> bool:
    """Run a command on hosts until it is done, stopped, or fails once too often.

    Args:
        plan: lays ranks out over the hosts that are left, or those of them that it can use.

    Returns:
        Whether it is done; False where it was stopped, and has saved.

    Raises:
        LaunchError: which rank failed first, on which host, and why.
    """
    failures: Counter[str] = Counter()
    left = list(hosts)
    before = restarts.latest(left)
    for number in range(restarts.most + 1):
        lost = fleet.reach(left)
        for gone in lost:
            note(f"{gone.host.name}: cannot be reached ({gone.why}); going on without it")
        left = [host for host in left if host.name in fleet.links]
        if not left:
            raise LaunchError(f"no host can be reached: {lost[-1].host.name}: {lost[-1].why}")
        if interrupts.any:
            return False
        if number and restarts.latest(left) != before:
            command = _from_latest(command)
        laid_out = plan(left)
        left = list(laid_out.hosts)
        ending = attempt(fleet, laid_out, command, interrupts, every_rank)
        if ending.first is None:
            return ending.done
        failures[ending.first.host.name] += 1
        story = _keep(ending, command.output)
        why = _tell(ending.first, len(hosts) > 1, command.output)
        if not ending.again or number == restarts.most or interrupts.any:
            raise LaunchError(f"{why}; what all ranks said last is in {story}" if len(hosts) > 1 else why)
        left = [host for host in left if failures[host.name] < MOST_FAILURES] if len(left) > 1 else left
        note(f"{why}; starting again from the latest checkpoint ({number + 1} of {restarts.most}; see {story})")
    raise AssertionError("the last attempt returns or raises")


def _from_latest(command: Command) -> Command:
    """A command of which a checkpoint was saved since it was first started."""
    words = ["--resume=latest" if word.startswith("--resume=") else word for word in command.module]
    return replace(command, module=words)


def _tell(end: End, several: bool, output: Path) -> str:
    told = f"rank {end.rank} on {end.host.name}: {end.why()}" if several else f"rank {end.rank}: {end.why()}"
    if end.error or end.code is None:
        return told
    full = output.exists() and shutil.disk_usage(output).free < 2**20
    return f"{told} ({'the disk is full' if full else 'out of memory'}?); see {output / 'logs'}"


def _keep(ending: Ending, output: Path) -> Path:
    """Write down what every rank said last, which the next start would bury; where there is room for it."""
    assert ending.first is not None
    logs = output / "logs"
    number = 1 + sum(1 for _ in logs.glob("failure-*"))
    folder = logs / f"failure-{number}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"rank {end.rank} on {end.host.name}: {end.why()}" + (f"; its last step: {end.step}" if end.step else "")
            for end in ending.ends
        ]
        first = f"first: rank {ending.first.rank} on {ending.first.host.name}: {ending.first.why()}"
        (folder / "why.txt").write_text("\n".join([first, *lines]) + "\n", encoding="utf-8")
        for end in ending.ends:
            if end.tail:
                (folder / f"rank-{end.rank}-{end.host.name}.log").write_text(end.tail, encoding="utf-8")
    except OSError:
        return logs
    return folder


def note(*lines: str) -> None:
    """What the launcher itself has to say."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)
