"""The launcher's end of one agent: a process that reaches a host, with orders going in and events coming out.

How a host is reached is a `Way`: on this host directly, by ssh, by pdsh, or as a step of a Slurm job. All have the
agent's input and output pass through; only pdsh passes no input on, so that orders go through a file that both hosts
see.
"""

import os
import queue
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bigtune.errors import LaunchError
from bigtune.launch.channel import Event, decode, encode
from bigtune.launch.hosts import Host
from bigtune.process import end_with_parent

AGENT = "bigtune.launch.agent"
WORDS_KEPT = 20
"""Lines of what ssh or srun says, for the message where a host is not reached."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to start an agent on a host.

    Args:
        prefix: what goes before a host's name: `ssh -o …`, `srun … --nodelist`; empty for this host itself.
        shell: whether what comes after it is read by a shell.
        orders: a folder that all hosts see, for the way that passes no input on.
        deserted: what an agent becomes whose launcher fell silent, when all that it ran has ended.
    """

    prefix: tuple[str, ...] = ()
    shell: bool = False
    orders: Path | None = None
    deserted: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return not self.prefix

    def command(self, host: Host, options: Sequence[str]) -> list[str]:
        """What to run here for an agent there."""
        agent = [sys.executable, "-m", AGENT, *options]
        if self.is_local:
            return agent
        return [*self.prefix, host.name, *([f"exec {shlex.join(agent)}"] if self.shell else agent)]


LOCAL = Way()


def ssh(program: str) -> Way:
    """By ssh, or what the user calls it with (`ssh -p 2222`). It asks nothing, and notices a dead host by itself."""
    options = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=3", "ServerAliveCountMax=3")
    words = [word for option in options for word in ("-o", option)]
    return Way((*shlex.split(program), *words, "--"), shell=True)


def pdsh(orders: Path) -> Way:
    """By pdsh over ssh, whose output is not labelled; orders lie in a folder that all hosts see."""
    return Way(("pdsh", "-R", "ssh", "-N", "-S", "-t", "10", "-w"), shell=True, orders=orders)


@dataclass(slots=True)
class Link:
    """One host, its agent, and what is heard of it."""

    host: Host
    events: "queue.Queue[tuple[Link, Event | None]]"
    process: "subprocess.Popen[bytes]"
    orders: IO[bytes]
    followed: Path | None
    heard: float | None = None
    """When, by this host's clock; None before the first word: a shared disk may be slow to start Python from."""
    words: deque[str] = field(default_factory=lambda: deque(maxlen=WORDS_KEPT))
    listener: threading.Thread | None = None

    @classmethod
    def start(cls, host: Host, way: Way, events: "queue.Queue[tuple[Link, Event | None]]") -> "Link":
        """Start an agent; whether it came up is told by its events.

        Raises:
            LaunchError: the program that reaches hosts is not there, or orders cannot be written.
        """
        options: list[str] = []
        followed = None
        if way.orders is not None:
            followed = way.orders / f"orders-{host.name}-{secrets.token_hex(4)}"
            try:
                way.orders.mkdir(parents=True, exist_ok=True)
                followed.touch(mode=0o600)
            except OSError as error:
                raise LaunchError(f"{way.orders}: cannot be written: {error.strerror}") from None
            options = ["--follow", str(followed)]
        if way.is_local:
            ours, theirs = os.pipe()
            process = _run(way.command(host, ["--events", str(theirs)]), stdin=subprocess.PIPE, pass_fds=(theirs,))
            os.close(theirs)
            told: IO[bytes] = os.fdopen(ours, "rb")
        else:
            process = _run(
                way.command(host, options), stdin=subprocess.DEVNULL if followed else subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None
            told = process.stdout
        orders = followed.open("ab", buffering=0) if followed else process.stdin
        assert orders is not None
        link = cls(host, events, process, orders, followed)
        if process.stderr is not None:
            link.listener = threading.Thread(target=link._keep_words, args=(process.stderr,), daemon=True)
            link.listener.start()
        threading.Thread(target=link._read, args=(told,), daemon=True).start()
        return link

    def send(self, **order: Any) -> None:
        """An order, or a sign of life. A host that is gone, or was let go, is told by its events."""
        with suppress(OSError, ValueError):
            self.orders.write(encode(order))
            self.orders.flush()

    def silence(self) -> float:
        """Seconds since something was heard; none before the first word."""
        return 0.0 if self.heard is None else time.monotonic() - self.heard

    def close(self) -> None:
        """Let the agent end, with all that it runs; what reaches it is ended where it does not end by itself."""
        with suppress(OSError):
            self.orders.close()
        if self.followed:
            self.followed.unlink(missing_ok=True)

    def kill(self) -> None:
        """Give the host up."""
        self.close()
        if self.process.poll() is None:
            self.process.kill()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.heard = time.monotonic()
            event = decode(line)
            if event:
                self.events.put((self, event))
            elif line.strip() not in (b"", b"{}"):
                self.words.append(line.decode(errors="replace").strip())
        self.events.put((self, None))

    def _keep_words(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="replace").strip()
            if text:
                self.words.append(text)


def _run(command: Sequence[str], **streams: Any) -> "subprocess.Popen[bytes]":
    """A process in a session of its own, that ends with this one."""
    try:
        return subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent, **streams)
    except FileNotFoundError as error:
        raise LaunchError(f"{error.filename}: there is no such program on this host") from None


def last_words(link: Link) -> str:
    """What the program that reached a host, or the shell there, said last, once it has ended."""
    if link.listener is not None:
        link.listener.join(1.0)
    return link.words[-1] if link.words else f"its agent ended with code {link.process.poll()}"
