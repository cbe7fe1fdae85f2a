"""Workers of one host: how many there may be."""

import os
import signal
import subprocess
import threading

import pytest

from bigtune.errors import LaunchError
from bigtune.launch.local import _Interrupts, check_ranks, default_ranks

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


def test_an_interruption_while_the_launcher_starts_is_not_lost() -> None:
    with _Interrupts() as interrupted:
        signal.raise_signal(signal.SIGTERM)
        process = subprocess.Popen(["sleep", "60"])
        interrupted.watch(process)
        assert process.wait(timeout=10) == -signal.SIGTERM
    assert interrupted.count == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_launcher_does_not_outlive_an_error_of_ours() -> None:
    with pytest.raises(ZeroDivisionError), _Interrupts() as interrupted:
        process = subprocess.Popen(["sleep", "60"])
        interrupted.watch(process)
        _ = 1 / 0
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_off_the_main_thread_signals_are_left_alone() -> None:
    seen = []

    def use() -> None:
        with _Interrupts() as interrupted:
            process = subprocess.Popen(["true"])
            interrupted.watch(process)
            seen.append(process.wait(timeout=10))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(timeout=20)
    assert seen == [0]
