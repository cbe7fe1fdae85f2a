"""Workers of one host: how many there may be."""

import os

import pytest

from bigtune.errors import LaunchError
from bigtune.launch.local import check_ranks, default_ranks

CORES = len(os.sched_getaffinity(0))


def test_as_many_ranks_as_cores_are_allowed() -> None:
    check_ranks(1, oversubscribe=False)
    check_ranks(CORES, oversubscribe=False)


def test_more_ranks_than_cores_are_refused_with_the_two_ways_out() -> None:
    with pytest.raises(LaunchError, match=f"this host has {CORES} core.*at most --ranks {CORES}, or --over"):
        check_ranks(CORES + 1, oversubscribe=False)
    check_ranks(CORES + 1, oversubscribe=True)


def test_cores_that_this_process_may_not_use_do_not_count() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with pytest.raises(LaunchError, match="this host has 1 core, "):
            check_ranks(2, oversubscribe=False)
    finally:
        os.sched_setaffinity(0, before)


def test_without_gpus_one_worker_takes_all_cores() -> None:
    assert default_ranks() == 1
