"""Signs of life between ranks, so that none waits in a collective for one that is gone, whoever started them.

Every rank holds one connection to rank 0 and sends a byte a second over it, both ways. A process that ends closes its
connection, which is seen at once; a host that dies or is cut off falls silent for `SILENT_SECONDS`. Rank 0 tells all
others, and each ends with the stacks of its threads in its log. A worker whose parent died, and that did not come to
the end of its step in `ORPHAN_SECONDS`, ends as well.
"""

import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from bigtune.dist import World
from bigtune.errors import LostError
from bigtune.process import LOST_OTHERS
from bigtune.train.console import WorkerConsole

BEAT_SECONDS = 1.0
SILENT_SECONDS = 15.0
ORPHAN_SECONDS = 8.0
JOIN_SECONDS = 60.0
KEY = "bigtune/pulse"


class Pulse:
    """This rank's part; `join` makes it, `leave` ends it before the process does."""

    def __init__(self, world: World, console: WorkerConsole) -> None:
        self._world, self._console = world, console
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self._parent = os.getppid()

    def join(self, store: Any) -> None:
        """Begin, on every rank.

        Args:
            store: of torch's rendezvous, through which rank 0 tells where it listens.

        Raises:
            LostError: rank 0 cannot be reached.
        """
        threading.Thread(target=self._watch_parent, name="bigtune-orphan", daemon=True).start()
        if self._world.world_size == 1:
            return
        if self._world.is_main:
            family = socket.AF_INET6 if ":" in os.environ.get("MASTER_ADDR", "") else socket.AF_INET
            listener = socket.create_server(("", 0), family=family, backlog=self._world.world_size)
            store.set(KEY, str(listener.getsockname()[1]))
            self._begin(self._lead, listener)
            return
        address = os.environ["MASTER_ADDR"], int(store.get(KEY))
        try:
            connection = socket.create_connection(address, JOIN_SECONDS)
        except OSError as error:
            where = f"{address[0]}, port {address[1]}"
            raise LostError(f"rank 0 cannot be reached ({where}: {error.strerror or error})") from None
        connection.sendall(json.dumps([self._world.rank, socket.gethostname()]).encode() + b"\n")
        self._begin(self._follow, connection)

    def leave(self) -> None:
        """From here on others may end, and this rank."""
        self._left.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_SECONDS)  # it says so, before this process's end could be taken for a failure

    def _begin(self, work: Callable[[socket.socket], None], by: socket.socket) -> None:
        self._thread = threading.Thread(target=work, args=(by,), name="bigtune-pulse", daemon=True)
        self._thread.start()

    def _lead(self, listener: socket.socket) -> None:
        members: dict[socket.socket, _Member] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            last = time.monotonic()
            while not self._left.is_set():
                for key, _ in selector.select(BEAT_SECONDS / 4):
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        connection.settimeout(BEAT_SECONDS)
                        members[connection] = _Member()
                        selector.register(connection, selectors.EVENT_READ)
                        continue
                    connection = key.fileobj  # type: ignore[assignment]
                    member = members[connection]
                    if not member.hear(connection):
                        selector.unregister(connection)
                        del members[connection]
                        if not member.left:
                            self._lost(member, "its process ended", members)
                now = time.monotonic()
                if now - last < BEAT_SECONDS:
                    continue
                held_up = now - last > 3 * BEAT_SECONDS  # what others sent meanwhile is not read yet
                last = now
                for connection, member in list(members.items()):
                    _send(connection, b".\n")
                    if not held_up and now - member.heard > SILENT_SECONDS:
                        del members[connection]
                        self._lost(member, f"it gave no sign of life for {SILENT_SECONDS:g} s", members)
            for connection in members:
                _send(connection, b"bye\n")

    def _lost(self, member: "_Member", why: str, members: dict[socket.socket, "_Member"]) -> None:
        """Tell all, and end."""
        text = f"rank {member.rank} on {member.host} is lost: {why}"
        for connection in members:
            _send(connection, json.dumps(text).encode() + b"\n")
        self._end(text)

    def _follow(self, connection: socket.socket) -> None:
        why = self._listen(connection)
        if why is None:
            _send(connection, b"bye\n")
        else:
            self._end(why)

    def _listen(self, connection: socket.socket) -> str | None:
        """Exchange signs of life with rank 0; why that ends, or None where one of both leaves as it should."""
        connection.settimeout(BEAT_SECONDS / 4)
        heard = last = time.monotonic()
        rest = b""
        while not self._left.is_set():
            try:
                found = connection.recv(4096)
            except TimeoutError:
                found = None
            except OSError:
                found = b""
            now = time.monotonic()
            if found == b"":
                return "rank 0 is lost: its process ended"
            if found:
                heard = now
                *lines, rest = (rest + found).split(b"\n")
                if b"bye" in lines:
                    return None
                told = next((line for line in lines if line.startswith(b'"')), None)
                if told:
                    return str(json.loads(told))
            held_up = now - last > 3 * BEAT_SECONDS  # what rank 0 sent meanwhile is not read yet
            if now - last >= BEAT_SECONDS:
                _send(connection, b".\n")
                last = now
            if now - heard > SILENT_SECONDS and not held_up:
                return f"rank 0 is lost: it gave no sign of life for {SILENT_SECONDS:g} s"
        return None

    def _watch_parent(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            if os.getppid() != self._parent:
                self._left.wait(ORPHAN_SECONDS)
                self._end("the process that started this worker is gone")

    def _end(self, why: str) -> None:
        if self._left.is_set() or self._console.failed:  # it ends by itself, for a reason of its own
            return
        faulthandler.dump_traceback(file=sys.stderr.fileno())
        self._console.fail(LostError(why))
        os._exit(LOST_OTHERS)


class _Member:
    """Another rank, as rank 0 hears of it."""

    def __init__(self) -> None:
        self.rank, self.host, self.left = -1, "?", False
        self.heard = time.monotonic()
        self._rest = b""

    def hear(self, connection: socket.socket) -> bool:
        """Read what came; False where the connection has ended."""
        try:
            found = connection.recv(4096)
        except TimeoutError:
            return True
        except OSError:
            return False
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + found).split(b"\n")
        for line in lines:
            if line == b"bye":
                self.left = True
            elif line.startswith(b"["):
                self.rank, self.host = json.loads(line)
        return bool(found)


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return  # read as its end, or its silence
