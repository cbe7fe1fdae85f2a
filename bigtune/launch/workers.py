"""The workers of this host, started and ended together: `python -m bigtune.launch.workers RANKS PORT MODULE …`.

They find in their environment what DeepSpeed's own launcher would tell them, which takes seconds to start, since it
imports torch, and a second to see that a worker has ended. If one fails, or this process is told to end, all do.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

LOOK_SECONDS = 0.05
GRACE_SECONDS = 30.0
"""From SIGTERM, with which a worker saves, to SIGKILL."""


Workers = list[subprocess.Popen[bytes]]


def start(workers: Workers, ranks: str, port: str, module: str, arguments: Sequence[str]) -> None:
    """Add so many workers to `workers`."""
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks,
        "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    for rank in range(int(ranks)):
        command = [sys.executable, "-u", "-m", module, f"--local_rank={rank}", *arguments]
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        workers.append(subprocess.Popen(command, env={**os.environ, **shared, **own}))


def wait(workers: Workers) -> int:
    """Until all have ended; the code of the first that failed, and 0 if none did.

    A signal's number N is told as 256 - N.
    """
    while True:
        codes = [worker.poll() for worker in workers]
        failed = next((code for code in codes if code), 0)
        if failed or None not in codes:
            return failed % 256
        time.sleep(LOOK_SECONDS)


def end(workers: Workers) -> None:
    """Have all end, with what they started."""
    processes = []
    for worker in workers:
        try:
            parent = psutil.Process(worker.pid)
            processes += [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    for process in alive:
        _signal(process, signal.SIGKILL)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


class _EndedError(Exception):
    """This process was told to end."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise _EndedError


def main(ranks: str, port: str, module: str, *arguments: str) -> int:
    """Run the workers to their end."""
    workers: Workers = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)
    code = 1
    try:
        start(workers, ranks, port, module, arguments)
        code = wait(workers)
    except _EndedError:
        pass
    if code:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        end(workers)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
