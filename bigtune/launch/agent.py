"""One host's processes, for a launcher that may be elsewhere: `python -m bigtune.launch.agent`.

    launcher ──orders──▶ agent ──▶ workers, each in a process group of its own
             ◀─events──

Orders come on standard input, or from a file that grows (`--follow FILE`, for what passes no input on), events go to
standard output (or `--events FD`), each a JSON object a line; `channel.py` lists them. The agent knows nothing of
training: it starts what it is told to start, tells what it prints and how it ends, and passes signals on. It needs its
launcher: when orders end, events find no reader, or nothing is heard for `SILENT_SECONDS`, all its processes end with
it. It imports nothing that takes time.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from bigtune.launch.channel import BEAT_SECONDS, SILENT_SECONDS, Order, decode, encode
from bigtune.process import end_with_parent

LOOK_SECONDS = 0.05
LEFT_SECONDS = 8.0
"""From SIGTERM to SIGKILL where the launcher is gone: a worker finishes its step and saves if it can."""
TOLD_SECONDS = 600.0
"""The same where this process was told to end, by a batch system, which itself says when it is too late."""
TAIL_BYTES = 16_000
"""Of the log of a process that failed, told with its end."""


@dataclass(slots=True)
class Child:
    """A process that was started, and where its words are."""

    name: str
    process: "subprocess.Popen[bytes]"
    words: dict[str, Path]
    """Files: its `log`, why it failed (`error`), its last `step`."""
    reader: threading.Thread | None = None
    ended: bool = False

    def signal(self, number: int) -> None:
        """To the process alone, SIGKILL to all of its group."""
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


@dataclass(slots=True)
class Agent:
    """The processes of one host and the launcher's orders."""

    events: IO[bytes]
    inherit: bool
    """Whether processes print where this one does, as on the launcher's own host."""
    orders: "queue.Queue[Order | None]" = field(default_factory=queue.Queue)
    children: list[Child] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    heard: float = field(default_factory=time.monotonic)
    kill_at: float | None = None
    leaving: bool = False
    deserted: bool = False
    if_deserted: list[str] = field(default_factory=list)
    """What to become then, once nothing runs any more."""
    _telling: Any = field(default_factory=threading.Lock)

    def listen(self, lines: Iterator[bytes]) -> None:
        """Take orders until they end."""
        for line in lines:
            self.heard = time.monotonic()
            order = decode(line)
            if order:
                self.orders.put(order)
        self.orders.put(None)

    def tell(self, **event: Any) -> None:
        """An event; a launcher that does not listen any more is as good as gone."""
        try:
            with self._telling:
                self.events.write(encode(event))
                self.events.flush()
        except OSError:
            self.orders.put(None)

    def serve(self) -> None:
        """Until the launcher or a signal ends it, and all processes with it."""
        last_beat = 0.0
        while not (self.leaving and not self._alive()):
            with suppress(queue.Empty):
                self._obey(self.orders.get(timeout=LOOK_SECONDS))
            now = time.monotonic()
            if now - last_beat >= BEAT_SECONDS:
                self.tell()
                last_beat = now
            if not self.inherit and now - self.heard > SILENT_SECONDS and not self.leaving:
                self.tell(leaves=f"its launcher was silent for {SILENT_SECONDS:g} s")
                self.deserted = True
                self._leave(signal.SIGUSR2, 1.0)
            self._look(now)
        for child in self.children:
            child.signal(signal.SIGKILL)

    def told_to_end(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self.orders.put({"end": {"signal": int(signal.SIGTERM), "grace": TOLD_SECONDS}, "told": number})

    def _obey(self, order: Order | None) -> None:
        if order is None:
            if not self.leaving:
                self._leave(signal.SIGTERM, LEFT_SECONDS)
            return
        if "setup" in order:
            self.environment = {**os.environ, **order["setup"]["environment"]}
            self.if_deserted = order["setup"]["deserted"]
            try:
                os.chdir(order["setup"]["folder"])
            except OSError as error:
                self.tell(failed=f"{order['setup']['folder']}: {error.strerror}")
                return
            self.tell(hello=True)
        elif "start" in order:
            for asked in order["start"]:
                self._start(asked)
        elif "signal" in order:
            for child in self._alive():
                child.signal(order["signal"])
        elif "end" in order and not self.leaving:
            if order.get("told"):
                self.tell(told=order["told"])
            for child in self._alive():
                child.signal(order["end"]["signal"])
            self.kill_at = time.monotonic() + order["end"]["grace"]

    def _start(self, asked: dict[str, Any]) -> None:
        pipe = None if self.inherit and not asked.get("capture") else subprocess.PIPE
        words: dict[str, Path] = {name: Path(asked[name]) for name in ("log", "error", "step") if name in asked}
        for name in words.keys() - {"log"}:
            with suppress(OSError):
                words[name].unlink(missing_ok=True)  # of an earlier start
        try:
            process = subprocess.Popen(
                asked["command"], env={**self.environment, **asked["environment"]}, stdin=subprocess.DEVNULL,
                stdout=pipe, stderr=None if pipe is None else subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as problem:
            self.tell(exit={"name": asked["name"], "code": 127, "error": f"{asked['command'][0]}: {problem.strerror}"})
            return
        self.kill_at = None
        child = Child(asked["name"], process, words)
        if process.stdout is not None:
            child.reader = threading.Thread(target=self._read, args=(child, process.stdout), daemon=True)
            child.reader.start()
        self.children.append(child)

    def _read(self, child: Child, stream: IO[bytes]) -> None:
        for line in stream:
            self.tell(output={"name": child.name, "text": line.decode(errors="replace").rstrip("\r\n")})

    def _look(self, now: float) -> None:
        """Tell of processes that have ended, and end those whose time is over."""
        for child in self._alive():
            code = child.process.poll()
            if code is None:
                if self.kill_at is not None and now >= self.kill_at:
                    child.signal(signal.SIGKILL)
                continue
            child.signal(signal.SIGKILL)  # what it may have left
            if child.reader is not None:
                child.reader.join(1.0)
            child.ended = True
            told = {"name": child.name, "code": code}
            if code:
                found = {name: _text(path) for name, path in child.words.items()}
                told["tail"] = found.pop("log", "")[-TAIL_BYTES:]
                told |= {name: text.strip() for name, text in found.items()}
            self.tell(exit=told)

    def _alive(self) -> list[Child]:
        return [child for child in self.children if not child.ended]

    def _leave(self, number: int, grace: float) -> None:
        self.leaving = True
        self.kill_at = time.monotonic() + grace
        for child in self._alive():
            child.signal(number)


def follow(path: Path) -> Iterator[bytes]:
    """The lines of a file that grows, until it is gone."""
    rest = b""
    with path.open("rb") as file:
        while path.exists():
            found = file.read()
            *lines, rest = (rest + found).split(b"\n")
            yield from lines
            if not found:
                time.sleep(BEAT_SECONDS / 2)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def main(arguments: list[str]) -> None:
    """Serve a launcher."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    inherit = "--events" in options
    # Under another number: no process of ours may write among the events.
    events = os.fdopen(int(options["--events"]) if inherit else os.dup(1), "wb")
    if inherit:
        end_with_parent()
    else:
        os.dup2(2, 1)
    agent = Agent(events, inherit)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, agent.told_to_end)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    lines = follow(Path(options["--follow"])) if "--follow" in options else iter(sys.stdin.buffer.readline, b"")
    threading.Thread(target=agent.listen, args=(lines,), daemon=True).start()
    agent.serve()
    if agent.deserted and agent.if_deserted:
        os.execvp(agent.if_deserted[0], agent.if_deserted)
    os._exit(0)  # without waiting for the thread that reads orders


if __name__ == "__main__":
    main(sys.argv[1:])
