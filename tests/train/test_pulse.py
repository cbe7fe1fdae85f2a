"""Signs of life between ranks: real processes, of which one ends, stands still, loses its parent, or leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bigtune.process import LOST_OTHERS

SILENT_SECONDS, ORPHAN_SECONDS = 5.0, 2.0
"""Shorter than a run's, which are tested on the cluster."""
SCRIPT = """
import os, pathlib, sys, time
from bigtune.dist import World
from bigtune.train.console import WorkerConsole
from bigtune.train import pulse as limits
from bigtune.train.pulse import Pulse

limits.SILENT_SECONDS, limits.ORPHAN_SECONDS = {silent}, {orphan}
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]

class Store:  # by files; what torch's does is tested on the cluster
    def set(self, key, value):
        (folder / "part").write_text(value)
        (folder / "part").rename(folder / "port")
    def get(self, key):
        while not (folder / "port").exists():
            time.sleep(0.01)
        return (folder / "port").read_bytes()

world = World.from_environment()
pulse = Pulse(world, WorkerConsole(folder, world))
pulse.join(Store())
(folder / f"joined-{world.rank}").touch()
while not all((folder / f"joined-{rank}").exists() for rank in range(world.world_size)):
    time.sleep(0.01)
time.sleep(1)
if what == "leave" or (what == "end" and world.rank == 2):
    if what == "leave":
        time.sleep(world.rank)  # some earlier than others
        pulse.leave()
        time.sleep(0.5)
    os._exit(0)
(folder / f"ready-{world.rank}").touch()
time.sleep(600)
""".replace("{silent}", str(SILENT_SECONDS)).replace("{orphan}", str(ORPHAN_SECONDS))
Start = Callable[[str], list["subprocess.Popen[bytes]"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Three ranks that do something."""
    started: list[subprocess.Popen[bytes]] = []

    def run(what: str) -> list["subprocess.Popen[bytes]"]:
        for rank in range(3):
            place = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, "-c", SCRIPT, str(tmp_path), what]
            started.append(subprocess.Popen(command, env={**os.environ, **place, "BIGTUNE_CHILD": "1"}))
        return started

    yield run
    for process in started:
        process.kill()
        process.wait()


def ready(folder: Path, *ranks: int) -> None:
    until = time.monotonic() + 60
    while not all((folder / f"ready-{rank}").exists() for rank in ranks):
        assert time.monotonic() < until
        time.sleep(0.02)


def said(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank-{rank}.error").read_text().strip()


def test_a_rank_that_ends_is_named_by_all_others_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start("end")
    assert [ranks[rank].wait(30) for rank in (0, 1)] == [LOST_OTHERS] * 2
    for rank in (0, 1):
        assert said(tmp_path, rank) == f"rank 2 on {os.uname().nodename} is lost: its process ended"
    assert "most recent call first" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_if_rank_0_ends_the_others_do(start: Start, tmp_path: Path) -> None:
    ranks = start("wait")
    ready(tmp_path, 0, 1, 2)
    ranks[0].kill()
    assert [ranks[rank].wait(30) for rank in (1, 2)] == [LOST_OTHERS] * 2
    assert said(tmp_path, 2) == "rank 0 is lost: its process ended"


@pytest.mark.parametrize("silent", [0, 2])
def test_a_rank_that_stands_still_is_found(start: Start, tmp_path: Path, silent: int) -> None:
    ranks = start("wait")
    ready(tmp_path, 0, 1, 2)
    began = time.monotonic()
    ranks[silent].send_signal(signal.SIGSTOP)
    assert ranks[1].wait(60) == LOST_OTHERS
    assert time.monotonic() - began > SILENT_SECONDS - 2
    assert f"gave no sign of life for {SILENT_SECONDS:g} s" in said(tmp_path, 1)


def test_those_that_leave_are_not_missed(start: Start) -> None:
    assert [rank.wait(60) for rank in start("leave")] == [0, 0, 0]


def test_a_worker_whose_launcher_is_gone_ends(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(SCRIPT)
    command = f"{sys.executable} {tmp_path}/worker.py {tmp_path} wait & wait"
    launcher = subprocess.Popen(["sh", "-c", command], env={**os.environ, "BIGTUNE_CHILD": "1"})
    ready(tmp_path, 0)
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + ORPHAN_SECONDS + 10
    while not (tmp_path / "logs" / "rank-0.error").exists() or not said(tmp_path, 0):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert said(tmp_path, 0) == "the process that started this worker is gone"
