"""One run a folder: a lock that tells who holds it, across processes, hosts and requeued jobs.

    OUTPUT/train.lock    {"host": …, "process": …, "job": …, "beat": 17}

On one host the system's own file lock decides, and frees it with its process. Not every shared file system passes such
locks on to other hosts, so the holder's beat decides between hosts: a number that it counts up. Whoever finds another
host's name watches it for a while; clocks are never compared. A batch system's job that is started again on another
host knows its own lock by the job's number.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from bigtune.dist import JOB
from bigtune.errors import LaunchError

BEAT_SECONDS = 5.0
WATCH_SECONDS = 4 * BEAT_SECONDS
"""How long a lock of another host must not move to be taken for an abandoned one."""
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", JOB)


class RunLock:
    """The right to write into a run's folder, for as long as the context lasts."""

    def __init__(self, output: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = output / "train.lock"
        self._lock = FileLock(output / "train.lock.held")
        job = next((f"{name} {environment[name]}" for name in JOBS if name in environment), None)
        self._me: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid(), "job": job}
        self._left = threading.Event()
        self._beat = 0

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            LaunchError: another run has it, or the folder cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._wait_for_another_host()
            self._write()
        except Timeout:
            raise self._taken(self._read()) from None
        except OSError as error:
            raise LaunchError(
                f"output: {self._path.parent.absolute()} cannot be written: {error.strerror or error}"
            ) from None
        threading.Thread(target=self._keep_beating, name="bigtune-lock", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._path.unlink(missing_ok=True)
        self._lock.release()

    def _wait_for_another_host(self) -> None:
        found = self._read()
        if not found or found.get("host") == self._me["host"]:
            return  # the system says that nobody on this host has it
        if self._me["job"] is not None and found.get("job") == self._me["job"]:
            return
        until = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 5)
            now = self._read()
            if not now:
                return
            if now != found:
                self._lock.release()
                raise self._taken(now)

    def _taken(self, holder: Mapping[str, Any]) -> LaunchError:
        job = f", job {holder['job']}" if holder.get("job") else ""
        who = f" (process {holder['process']} on {holder['host']}{job})" if holder else ""
        return LaunchError(f"output: another run is training in {self._path.parent}{who}; wait for it, or give another")

    def _read(self) -> dict[str, Any]:
        """What the lock says; nothing where there is none, or none that can be read."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) and "host" in found and "process" in found else {}
        except (OSError, ValueError):
            return {}

    def _write(self) -> None:
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps({**self._me, "beat": self._beat}) + "\n", encoding="utf-8")
        aside.replace(self._path)

    def _keep_beating(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            self._beat += 1
            try:
                self._write()
            except OSError:  # a full disk, which the next save tells
                continue
