"""One attempt at a run: its workers on all hosts, from their start until the last has ended.

The first that fails has the others dump their stacks and end: they would wait for it in a collective. What failed first
is told apart from what followed: a rank that lost others says so by its exit code.
"""

import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigtune.launch.channel import SILENT_SECONDS, Event
from bigtune.launch.fleet import SETTLE_SECONDS, Fleet, Lost
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.plan import Place, Plan
from bigtune.process import LOST_OTHERS, STOPPED, USERS_ERROR, signal_name

DUMP_SECONDS = 4.0
"""For stacks, then SIGKILL."""
LOST = re.compile(r"rank (?P<rank>\d+)(?: on \S+)? is lost: (?P<why>.+)")
"""What `bigtune.train.pulse` says."""
DUMP_SIGNAL = int(signal.SIGUSR2)
"""A worker writes the stacks of its threads into its log, and ends by it."""


@dataclass(frozen=True, slots=True)
class Command:
    """What every rank runs.

    Args:
        module: with its arguments.
        environment: on top of a rank's own.
        output: the run's folder, whose `logs` has what each rank says.
    """

    module: Sequence[str]
    output: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def order(self, place: Place) -> dict[str, object]:
        """What an agent is told to start."""
        logs = self.output / "logs"
        local_rank = place.environment["LOCAL_RANK"]
        module, *arguments = self.module
        return {
            "name": str(place.rank),
            "command": [sys.executable, "-u", "-m", module, f"--local_rank={local_rank}", *arguments],
            "environment": {**place.environment, **self.environment},
            "log": str(logs / f"rank-{place.rank}.log"),
            "error": str(logs / f"rank-{place.rank}.error"),
            "step": str(logs / f"rank-{place.rank}.step"),
        }


def worker_arguments(output: Path, resume: str | None, new_data: bool) -> list[str]:
    """The run file that a host was made ready with, and how it goes on."""
    return [str(output / "run.yaml"), *[f"--resume={resume}"] * (resume is not None), *["--new-data"] * new_data]


@dataclass(frozen=True, slots=True)
class End:
    """How one rank ended. No code: its host was lost."""

    rank: int
    host: Host
    code: int | None
    order: int
    error: str = ""
    step: str = ""
    """The numbers of its last step, as JSON."""
    tail: str = ""
    """Of its log."""
    ended_here: bool = False
    """By the launcher, since another had failed."""

    @property
    def failed(self) -> bool:
        return self.code not in (0, STOPPED)

    @property
    def followed(self) -> bool:
        """Whether it only tells of others."""
        return self.ended_here or self.code == LOST_OTHERS

    def why(self) -> str:
        """In one line, its own words where it had any."""
        if self.error:
            return self.error.splitlines()[0]
        if self.code is None:
            return "its host is lost"
        ending = f"by signal {signal_name(self.code)}" if self.code < 0 else f"with code {self.code}"
        return f"ended {ending} without a word"


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended: done, stopped on request, or failed, by `first` of `ends`."""

    done: bool
    first: End | None
    ends: Sequence[End]

    @property
    def again(self) -> bool:
        """Whether the same could end otherwise: not a mistake in the run file or the data."""
        return self.first is not None and self.first.code != USERS_ERROR


def attempt(fleet: Fleet, plan: Plan, command: Command, interrupts: Interrupts, every_rank: bool) -> Ending:
    """Start a plan's workers and wait for their end.

    Args:
        every_rank: show what all print, each line with host and rank.
    """
    watch = _Watch(fleet, {place.rank: place for place in plan.places()}, every_rank)
    watch.start(command)
    while watch.waits:
        for number in interrupts.take():
            fleet.send(**({"end": {"signal": number, "grace": 0}} if number == signal.SIGKILL else {"signal": number}))
        heard = fleet.hear(0.05)
        if isinstance(heard, Lost):
            watch.lose(heard)
        elif heard is not None:
            interrupts.elsewhere |= "told" in heard[1]
            watch.take(*heard)
        watch.end_others(time.monotonic())
    return _judge(watch.ends, interrupts)


@dataclass(slots=True)
class _Watch:
    """Which ranks are still to end, and how the others ended."""

    fleet: Fleet
    waits: dict[int, Place]
    every_rank: bool
    ends: list[End] = field(default_factory=list)
    failed_at: float | None = None
    ending_at: float | None = None

    def start(self, command: Command) -> None:
        """Have every host start its workers."""
        by_host: dict[str, list[Place]] = {}
        for place in self.waits.values():
            by_host.setdefault(place.host.name, []).append(place)
        for name, places in by_host.items():
            if name in self.fleet.links:
                self.fleet.links[name].send(start=[command.order(place) for place in places])
            else:
                self.lose(Lost(places[0].host, "it is not heard any more"))

    def take(self, host: Host, event: Event) -> None:
        """What an agent tells."""
        told = event.get("output") or event.get("exit") or {}
        if not told.get("name", "").isdigit() or int(told["name"]) not in self.waits:
            return  # of what was run before
        if "output" in event:
            prefix = f"[{host.name} rank {told['name']}] " if self.every_rank else ""
            print(prefix + told["text"], flush=True)
        else:
            self._note(self.waits[int(told["name"])], told["code"], told)

    def lose(self, lost: Lost) -> None:
        """A host, with all its ranks."""
        for place in [place for place in self.waits.values() if place.host.name == lost.host.name]:
            self._note(place, None, {"error": lost.why})

    def end_others(self, now: float) -> None:
        """Once one has failed, and others had time to say why."""
        failures = [end for end in self.ends if end.failed]
        if not failures:
            return
        if self.failed_at is None:
            self.failed_at = now
        if self.ending_at is None:
            # A rank that lost another may be told before the silence of that one's host is.
            known = any(not end.followed for end in failures) or self.fleet.all_heard()
            settle = SETTLE_SECONDS if known else SILENT_SECONDS + 2
            if now - self.failed_at > settle:
                self.fleet.send(end={"signal": DUMP_SIGNAL, "grace": DUMP_SECONDS})
                self.ending_at = now
        elif now - self.ending_at > DUMP_SECONDS + SILENT_SECONDS:
            for host in {place.host for place in self.waits.values()}:
                if host.name in self.fleet.links:
                    self.fleet.drop(host, "did not end its workers")
                self.lose(Lost(host, "it did not end its workers"))

    def _note(self, place: Place, code: int | None, told: Mapping[str, Any]) -> None:
        del self.waits[place.rank]
        words = {name: told.get(name, "") for name in ("error", "step", "tail")}
        ended_here = self.ending_at is not None
        self.ends.append(End(place.rank, place.host, code, len(self.ends), **words, ended_here=ended_here))


def _judge(ends: Sequence[End], interrupts: Interrupts) -> Ending:
    failures = [end for end in ends if end.failed]
    if not failures:
        return Ending(done=all(end.code == 0 for end in ends), first=None, ends=ends)
    # Before its first step a worker that is asked to stop ends at once, by the signal; others may then miss it.
    asked = interrupts.any and all(end.followed or end.code in (-15, -9, -2, -1) for end in failures)
    if asked or interrupts.count > 1:
        return Ending(done=False, first=None, ends=ends)
    first = min(failures, key=lambda end: (_class(end), end.order))
    return Ending(done=False, first=_blamed(first, ends), ends=ends)


def _blamed(first: End, ends: Sequence[End]) -> End:
    """Where all that is known is that a rank lost another: that other, and what is said of it."""
    lost = LOST.match(first.error) if first.followed else None
    other = next((end for end in ends if lost and end.rank == int(lost["rank"])), None)
    return replace(other, error=lost["why"], code=other.code or LOST_OTHERS) if lost and other else first


def _class(end: End) -> int:
    """What comes first among failures that came at about the same time."""
    if end.followed:
        return 3
    if end.code == USERS_ERROR or (end.code is not None and end.error):
        return 0
    return 1 if end.code is not None else 2
