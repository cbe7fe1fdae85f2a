"""Workers on this host, through a launcher, and their end.

    bigtune train ──▶ bigtune.launch.workers ──▶ bigtune.train (one a rank)

The launcher gets a session of its own, so that Ctrl-C reaches this process alone: it asks the workers to
finish their step and save. A second Ctrl-C ends them at once.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

from bigtune.dist import CHILD
from bigtune.errors import LaunchError
from bigtune.process import end_with_parent
from bigtune.train.signals import STOPPED


def default_ranks() -> int:
    """The number of GPUs; without any, one worker with all cores."""
    return len(gpus()) or 1


def gpus() -> list[str]:
    """This host's CUDA devices, by the names that CUDA_VISIBLE_DEVICES has or would have for them."""
    if not Path("/dev/nvidiactl").exists():
        return []  # spares importing torch
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(count))) if visible is None else visible.split(",")[:count]


def check_ranks(ranks: int, oversubscribe: bool) -> None:
    """Refuse more workers than the host can serve.

    Raises:
        LaunchError: more ranks than GPUs, or than cores without `oversubscribe`.
    """
    devices, cores = len(gpus()), len(os.sched_getaffinity(0))
    if devices and ranks > devices:
        raise LaunchError(f"--ranks {ranks}: this host has {_count(devices, 'GPU')}; give at most --ranks {devices}")
    if not devices and ranks > cores and not oversubscribe:
        raise LaunchError(
            f"--ranks {ranks}: this host has {_count(cores, 'core')}, and ranks that share one are slow; "
            f"give at most --ranks {cores}, or --oversubscribe"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def launch(ranks: int, worker_arguments: Sequence[str], output: Path) -> bool:
    """Run `bigtune.train` on `ranks` workers, whose documents are prepared, and wait.

    Returns:
        True, or False if the run was interrupted, or left before its time limit: the workers have saved then.

    Raises:
        LaunchError: a worker failed; the message is that of the rank that failed first.
    """
    for old in (output / "logs").glob("rank-*.error"):
        old.unlink()
    command = [
        sys.executable, "-m", "bigtune.launch.workers", str(ranks), str(_free_port()), "bigtune.train",
        *worker_arguments,
    ]  # fmt: skip
    environment = {**os.environ, CHILD: "1"}
    if devices := gpus():
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:ranks])
    else:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    with _Interrupts() as interrupted:
        process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
        interrupted.watch(process)
        code = process.wait()
    if code == 0:
        return True  # also where it was interrupted in its last step
    if code == STOPPED:
        return False
    # Before its first step a worker that is asked to stop ends at once, by the signal perhaps; the others may then miss
    # it in a collective.
    if interrupted.count and (
        interrupted.count > 1 or _signal(code) == signal.SIGTERM or (code == 1 and not _causes(output))
    ):
        return False
    raise LaunchError(_first_error(output, code))


class _Interrupts:
    """Passes interruptions on: first as a request to the workers, then as SIGKILL; and requests for a save.

    SIGHUP is one, since an ssh session that is lost sends it. Only the main thread gets signals; started from
    another, a run is interrupted through its workers.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._handle)
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask_for_save)
        return self

    def watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Pass interruptions on to this launcher, one that came while it was starting as well."""
        self.process = process
        if self.count:
            process.terminate()

    def __exit__(self, *error: object) -> None:
        if self.process is not None and self.process.poll() is None:  # leaving by an error of our own
            self._end()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.process is None:
            return
        if self.count > 1:
            self._end()
            return
        with suppress(OSError):  # a terminal that is gone
            print("\nstopping: the workers finish their step and save; again to end them at once", file=sys.stderr)
        if not self._tell_workers(signal.SIGTERM):  # not started yet
            self.process.terminate()

    def _ask_for_save(self, number: int, frame: FrameType | None) -> None:
        self._tell_workers(signal.SIGUSR1)

    def _tell_workers(self, number: int) -> bool:
        """Send a signal to the workers, and say whether there are any."""
        workers = [child for child in _children(self.process.pid) if _is_worker(child)] if self.process else []
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
        return bool(workers)

    def _end(self) -> None:
        assert self.process is not None
        for child in _children(self.process.pid):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.kill()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "bigtune.train" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _signal(code: int) -> int | None:
    """The signal that a launcher's exit code tells of: -N of its own, 256 - N of a worker, 128 + N of a shell."""
    if code < 0:
        return -code
    return 256 - code if code > 192 else code - 128 if code > 128 else None


LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say of a rank that is gone; its own words, or its silence, are the cause."""


def _causes(output: Path) -> list[str]:
    """What failing ranks have to say of their own, the first that failed first."""
    errors = sorted((output / "logs").glob("rank-*.error"), key=lambda path: path.stat().st_mtime_ns)
    said = {path.stem.removeprefix("rank-"): path.read_text(encoding="utf-8").strip() for path in errors}
    return [
        f"rank {rank}: {text}"
        for rank, text in said.items()
        if text and not any(lost in text for lost in LOST_RANK)  # on a full disk the file stays empty
    ]


def _first_error(output: Path, code: int) -> str:
    """What the rank that failed first has to say."""
    causes = _causes(output)
    if causes:
        return causes[0]
    ended_by = _signal(code)
    ending = f" by signal {ended_by}" if ended_by else f" with code {code}"
    guess = "the disk is full" if shutil.disk_usage(output).free < 2**20 else "out of memory"
    return f"a worker ended{ending} without a word ({guess}?); see {output / 'logs'}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
