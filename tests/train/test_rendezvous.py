"""How ranks find each other, by whoever started them."""

import os
import socket
import threading
from collections.abc import Mapping
from typing import Any
from unittest import mock

import psutil
import pytest

from bigtune.dist import World
from bigtune.errors import LaunchError, LostError
from bigtune.launch.local import free_port
from bigtune.train import rendezvous
from bigtune.train.rendezvous import choose_interface, interface_to, meet, ranks_of_srun

STEP = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n7", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "1000", "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_without_slurm_nothing_is_said() -> None:
    assert ranks_of_srun({}) == {}
    assert ranks_of_srun({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert ranks_of_srun({**STEP, "BIGTUNE_CHILD": "1", "RANK": "0"}) == {}


def test_srun_alone_gives_a_worker_its_place() -> None:
    found = ranks_of_srun({**STEP, "MASTER_ADDR": "n7"})
    assert World.from_environment(found) == World(rank=3, world_size=4, local_rank=1, local_size=2, node=1)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("n7", "27002")


def test_a_launcher_on_each_node_is_let_alone() -> None:
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert ranks_of_srun({**step, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == {}


@pytest.mark.parametrize(
    "launcher",
    [
        {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},  # two tasks a node, each with a launcher
        {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"},  # each for itself
    ],
)
def test_both_dealing_out_ranks_is_refused(launcher: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="srun started 4 tasks, and each of them a launcher"):
        ranks_of_srun(STEP | launcher)


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            mock.patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}),
            pytest.raises(LaunchError, match=f"cannot listen at 127.0.0.1, port {port}: another program has it"),
        ):
            meet(World())


def gather(world_size: int, problems: Mapping[int, str], late: int | None = None) -> dict[int, str]:
    """Have ranks meet, each in a thread; what each is told, `met` where it may go on. One may never come."""
    told: dict[int, str] = {}

    def come(rank: int) -> None:
        try:
            stores.append(meet(World(rank, world_size, rank, world_size), problems.get(rank, "")))
            told[rank] = "met"
        except LostError as error:
            told[rank] = str(error)

    stores: list[Any] = []  # rank 0's is alive until all have met
    ranks = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size) if rank != late]
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}):
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return told


def test_ranks_meet() -> None:
    assert gather(3, {}) == {0: "met", 1: "met", 2: "met"}


@pytest.mark.parametrize("rank", [0, 2])
def test_all_are_told_at_once_of_one_that_cannot_go_on(rank: int) -> None:
    assert set(gather(3, {rank: "n2: no such run file"}).values()) == {"n2: no such run file"}


def test_a_rank_that_does_not_come_is_named() -> None:
    with mock.patch.multiple(rendezvous, MEET_SECONDS=1.0, TELL_SECONDS=1.0):
        assert set(gather(3, {}, late=1).values()) == {"rank 1 did not come up in 1 s"}


def test_the_interface_is_the_one_that_leads_there() -> None:
    assert interface_to("127.0.0.1") is None
    assert interface_to("no-such-host.invalid") is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                assert interface_to(address.address) == name


def test_an_interface_that_the_user_named_is_kept() -> None:
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "a", "NCCL_SOCKET_IFNAME": "b"}):
        choose_interface("127.0.0.1")
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("a", "b")
