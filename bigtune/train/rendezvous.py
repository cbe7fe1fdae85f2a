"""How ranks find each other: torch's rendezvous at MASTER_ADDR, over the network interface that leads there."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil

from bigtune.dist import CHILD, World
from bigtune.errors import LaunchError, LostError

MEET_SECONDS = 300.0
"""For all ranks to come up."""
TELL_SECONDS = 30.0
"""For a rank that cannot go on to tell the others why. Rank 0 stays so long for those that come late."""
CAME, MET, TOLD, ALL = "bigtune/came", "bigtune/met", "bigtune/told", "all"


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


def meet(world: World, problem: str = "") -> Any:
    """The store that all ranks share, once all are there.

    Args:
        problem: why this rank cannot go on. All then end at once, instead of waiting for it.

    Raises:
        LaunchError: rank 0 cannot listen where it should.
        LostError: a rank did not come, or cannot go on, or rank 0 cannot be reached.
    """
    from torch.distributed import DistError

    if world.world_size > world.local_size:
        choose_interface(os.environ["MASTER_ADDR"])
    store = _open(world, TELL_SECONDS if problem else MEET_SECONDS)
    try:
        store.set(f"{CAME}/{world.rank}", "")
        if problem:
            store.compare_set(MET, "", problem)
        elif store.add(CAME, 1) >= world.world_size:  # more, where torchrun starts again with the same store
            store.compare_set(MET, "", ALL)
        said = _wait(store, world)
        if said == ALL:
            return store
        store.add(TOLD, 1)
        if world.is_main:
            _stay_for_others(store, world)
    except DistError:
        said = "rank 0 is gone before all ranks had come up"
    raise LostError(said)


def _open(world: World, seconds: float) -> Any:
    """A store at MASTER_ADDR, of rank 0 or of torchrun, which does not wait for ranks to come."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 29500))
    here = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=seconds)
    try:
        return TCPStore(address, port, world.world_size, here, timeout=limit, wait_for_workers=False)
    except DistError as error:
        where = f"{address}, port {port}"
        if here:
            in_use = "another program has it" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            raise LaunchError(f"rank 0 cannot listen at {where}: {in_use}; give another MASTER_PORT") from None
        raise LostError(f"rank 0 cannot be reached at {where}, or did not come up") from None


def _wait(store: Any, world: World) -> str:
    """What all ranks are told: `ALL`, or what keeps one from going on."""
    from torch.distributed import DistStoreError

    try:  # rank 0 is the first to give up, and tells
        store.wait([MET], timedelta(seconds=MEET_SECONDS + (0 if world.is_main else TELL_SECONDS)))
    except DistStoreError:
        missing = [str(rank) for rank in range(world.world_size) if not store.check([f"{CAME}/{rank}"])]
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(missing)}"
        store.compare_set(MET, "", f"{ranks} did not come up in {MEET_SECONDS:g} s")
    return str(store.get(MET).decode())


def _stay_for_others(store: Any, world: World) -> None:
    """The store lives in this process: until all know why they end, or will not come any more."""
    until = time.monotonic() + TELL_SECONDS
    while store.add(TOLD, 0) < world.world_size and time.monotonic() < until:
        time.sleep(0.05)


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
