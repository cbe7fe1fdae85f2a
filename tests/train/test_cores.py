"""Each worker of a host has cores of its own."""

import pytest

from bigtune.dist import World
from bigtune.train.cores import cores_of


def shares(workers: int, cores: list[int]) -> list[list[int]]:
    return [cores_of(World(local_rank=rank, local_size=workers), cores) for rank in range(workers)]


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_cores_are_dealt_once_in_order_and_evenly(workers: int) -> None:
    cores = [0, 1, 2, 5, 6, 7, 10, 11]  # as a batch system gives them
    dealt = shares(workers, cores)
    assert [core for share in dealt for core in share] == cores
    sizes = [len(share) for share in dealt]
    assert max(sizes) - min(sizes) <= 1


def test_too_few_cores_are_shared_one_each_in_turn() -> None:
    assert shares(5, [4, 9]) == [[4], [9], [4], [9], [4]]
    assert shares(2, [3]) == [[3], [3]]


def test_workers_of_other_hosts_do_not_matter() -> None:
    world = World(rank=5, world_size=8, local_rank=1, local_size=2, node=2)
    assert cores_of(world, [0, 1, 2, 3]) == [2, 3]
