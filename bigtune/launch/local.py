"""This host: its GPUs and cores, and a run on them alone."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from bigtune.dist import CHILD
from bigtune.errors import LaunchError, count_of
from bigtune.launch.attempt import Command
from bigtune.launch.fleet import Fleet
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.link import LOCAL
from bigtune.launch.plan import Plan
from bigtune.launch.supervise import Restarts, supervise


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
        raise LaunchError(f"--ranks {ranks}: this host has {count_of(devices, 'GPU')}; give at most --ranks {devices}")
    if not devices and ranks > cores and not oversubscribe:
        raise LaunchError(
            f"--ranks {ranks}: this host has {count_of(cores, 'core')}, and ranks that share one are slow; "
            f"give at most --ranks {cores}, or --oversubscribe"
        )


def launch(ranks: int, worker_arguments: Sequence[str], output: Path, restarts: Restarts) -> bool:
    """Run `bigtune.train` on `ranks` workers of this host, whose documents are prepared, and wait.

    Returns:
        True, or False if the run was interrupted, or left before its time limit: the workers have saved then.

    Raises:
        LaunchError: a worker failed; the message is that of the rank that failed first.
    """
    host = Host(socket.gethostname(), tuple(range(ranks)))
    devices = {host.name: gpus()}
    command = Command(["bigtune.train", *worker_arguments], output, {CHILD: "1"})

    def plan(hosts: Sequence[Host]) -> Plan:
        return Plan(hosts, "127.0.0.1", free_port(), devices)

    with Interrupts() as interrupts, Fleet(LOCAL, str(Path.cwd()), {}) as fleet:
        return supervise(fleet, [host], plan, command, interrupts, restarts)


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
