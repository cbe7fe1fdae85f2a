"""How ranks find each other: torch's rendezvous at MASTER_ADDR, over the network interface that leads there."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil

from bigtune.dist import CHILD, World
from bigtune.errors import LaunchError, LostError

MEET_SECONDS = 300.0
"""For all ranks to come up."""


def ranks_of_srun(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a launcher would tell a worker that srun started by itself; nothing where there is a launcher.

    Raises:
        LaunchError: srun and a launcher below it both deal out ranks.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    here = int(re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])  # type: ignore[index]
    if tasks == 1 or CHILD in environment:
        return {}
    if "RANK" in environment:
        local = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE"))
        if here > 1 or environment.get("WORLD_SIZE") == local:
            raise LaunchError(
                f"srun started {tasks} tasks, and each of them a launcher that deals out ranks as well; give srun "
                "--ntasks-per-node=1 and the launcher its nodes, or start bigtune.train by srun alone"
            )
        return {}
    names = environment["SLURM_STEP_NODELIST"]
    first = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=False)
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "CROSS_RANK": environment["SLURM_NODEID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or (first.stdout.split() or [names])[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (7 * job + step) % 20000),
    }


def meet(world: World) -> Any:
    """The store that all ranks share, once rank 0 is there.

    Raises:
        LaunchError: rank 0 cannot listen where it should.
        LostError: rank 0 did not come, or cannot be reached.
    """
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    if world.world_size > world.local_size:
        choose_interface(os.environ["MASTER_ADDR"])
    where = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
    limit = timedelta(seconds=MEET_SECONDS)
    try:
        store, _, _ = next(rendezvous("env://", rank=world.rank, world_size=world.world_size, timeout=limit))
    except DistError as error:
        if world.is_main:
            in_use = "another program has it" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            raise LaunchError(f"rank 0 cannot listen at {where}: {in_use}; give another MASTER_PORT") from None
        raise LostError(f"rank 0 cannot be reached at {where}, or did not come up") from None
    return store


def choose_interface(address: str) -> None:
    """Have gloo and NCCL use the interface that reaches an address, where the user named none."""
    if "GLOO_SOCKET_IFNAME" in os.environ and "NCCL_SOCKET_IFNAME" in os.environ:
        return
    found = interface_to(address)
    if found is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", found)


def interface_to(address: str) -> str | None:
    """The name of the network interface that packets to an address leave by; of the one that has it, if it is ours."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            source = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == source for found in addresses):
            return None if source.startswith("127.") or source == "::1" else name
    return None
