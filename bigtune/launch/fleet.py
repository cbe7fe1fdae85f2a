"""The agents of all hosts of a run: reached together, heard together, kept alive by a sign each second."""

import itertools
import queue
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from bigtune.launch.channel import BEAT_SECONDS, SILENT_SECONDS, Event
from bigtune.launch.hosts import Host
from bigtune.launch.link import Link, Way, last_words

REACH_SECONDS = 60.0
"""For an agent to come up."""
SETTLE_SECONDS = 1.0
"""For others to fail as well, one of which may have been the first."""
CLOSE_SECONDS = 12.0
"""For an agent to end what it runs, once its launcher leaves: longer than it takes by itself."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A host that is not heard any more, and why."""

    host: Host
    why: str


@dataclass(slots=True)
class Outcome:
    """How one command ended on one host, and what it printed."""

    code: int | None = None
    lines: list[str] = field(default_factory=list)
    unended: bool = False
    """It took too long, or waited for one that failed."""

    @property
    def last(self) -> str:
        return next((line for line in reversed(self.lines) if line.strip()), f"ended with code {self.code}")


class Fleet:
    """Hosts with an agent each. A host whose agent falls silent or ends is lost, and told as an event."""

    def __init__(self, way: Way, folder: str, environment: Mapping[str, str]) -> None:
        self.way = way
        self.links: dict[str, Link] = {}
        self._setup = {"folder": folder, "environment": dict(environment), "deserted": way.deserted}
        self._events: queue.Queue[tuple[Link, Event | None]] = queue.Queue()
        self._closed = threading.Event()
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        threading.Thread(target=self._keep_beating, name="bigtune-beat", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Every agent ends what it runs; those that do not are cut off, and then end by themselves."""
        for link in self.links.values():
            link.close()
        until = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < until and any(link.process.poll() is None for link in self.links.values()):
            time.sleep(0.02)
        self._closed.set()
        for link in self.links.values():
            link.kill()

    def reach(self, hosts: Iterable[Host]) -> list[Lost]:
        """Start agents where there are none; tells which hosts could not be reached, and why.

        Raises:
            LaunchError: the program that reaches hosts cannot be started here.
        """
        asked = [host for host in hosts if host.name not in self.links]
        for host in asked:
            link = self.links[host.name] = Link.start(host, self.way, self._events)
            link.send(setup=self._setup)
        waits, lost = {host.name for host in asked}, []
        until = time.monotonic() + REACH_SECONDS
        while waits:
            heard = self.hear(0.1)
            if isinstance(heard, Lost):
                waits.discard(heard.host.name)
                lost.append(heard)
            elif heard is not None and "hello" in heard[1]:
                waits.discard(heard[0].name)
            elif heard is not None and "failed" in heard[1]:
                waits.discard(heard[0].name)
                lost.append(self.drop(heard[0], heard[1]["failed"]))
            if time.monotonic() > until:
                for host in asked:
                    if host.name in waits:
                        lost.append(self.drop(host, f"no answer for {REACH_SECONDS:g} s"))
                break
        return lost

    def hear(self, seconds: float) -> tuple[Host, Event] | Lost | None:
        """The next event, or a host that is lost; nothing, where nothing comes for so long."""
        for link in self.links.values():
            if link.silence() > SILENT_SECONDS and not self.way.is_local:
                return self.drop(link.host, f"no sign of life for {SILENT_SECONDS:g} s")
        try:
            link, event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if self.links.get(link.host.name) is not link:
            return None  # of an agent that was given up
        if event is None:
            with suppress(subprocess.TimeoutExpired):
                link.process.wait(CLOSE_SECONDS)
            return self.drop(link.host, last_words(link))
        if "leaves" in event:
            return self.drop(link.host, event["leaves"])
        return link.host, event

    def all_heard(self) -> bool:
        """Whether no host is silent, not even for little longer than from one sign of life to the next."""
        return all(link.silence() < 3 * BEAT_SECONDS for link in self.links.values())

    def drop(self, host: Host, why: str) -> Lost:
        """Give a host up."""
        self.links.pop(host.name).kill()
        return Lost(host, why)

    def everywhere(
        self, hosts: Sequence[Host], command: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> dict[str, Outcome]:
        """Run one command on each host at once, to its end.

        Returns:
            What came of it by host; no code where a host was lost or took too long.
        """
        commands = {host.name: (list(command), dict(environment)) for host in hosts}
        return self.each(commands, seconds)

    def each(
        self, commands: Mapping[str, tuple[list[str], dict[str, str]]], seconds: float, together: bool = False
    ) -> dict[str, Outcome]:
        """Run a command a host, with its environment, at once, to their end; by host, as `everywhere`.

        Args:
            together: once one fails the others, which would wait for it, are ended.
        """
        own = f"command-{next(self._numbers)}"
        found = {name: Outcome() for name in commands}
        for name, (command, environment) in commands.items():
            asked = {"name": own, "command": command, "environment": environment, "capture": True}
            if name in self.links:
                self.links[name].send(start=[asked])
        waits, until = set(commands) & set(self.links), time.monotonic() + seconds
        failed = len(waits) < len(commands)
        while waits and time.monotonic() < until:
            heard = self.hear(0.1)
            if isinstance(heard, Lost):
                if heard.host.name in found:
                    waits.discard(heard.host.name)
                    found[heard.host.name].lines.append(heard.why)
                    failed = True
            elif heard is not None:
                host, event = heard
                told = event.get("output") or event.get("exit") or {}
                if told.get("name") != own:
                    continue  # of what was run before
                outcome = found[host.name]
                if "output" in event:
                    outcome.lines.append(told["text"])
                else:
                    outcome.code = told["code"]
                    if told.get("error"):
                        outcome.lines.append(told["error"])
                    waits.discard(host.name)
                    failed |= outcome.code != 0
            if failed and together:
                until, failed = min(until, time.monotonic() + SETTLE_SECONDS), False
        for name in waits:
            found[name].unended = True
            found[name].lines.append(f"did not end within {seconds:g} s")
            self.links[name].send(end={"signal": 9, "grace": 0})
        return found

    def send(self, **order: Any) -> None:
        """The same order to every host."""
        for link in self.links.values():
            link.send(**order)

    def _keep_beating(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            for link in list(self.links.values()):
                link.send()
