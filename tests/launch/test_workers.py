"""The launcher's process: what workers are told, and that they end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = """
import json, os, pathlib, signal, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[2])
told = {**os.environ, "pid": os.getpid(), "words": sys.argv[1:]}
(folder / f"{rank}.part").write_text(json.dumps(told))
(folder / f"{rank}.part").rename(folder / f"{rank}.json")
if rank == sys.argv[3]:
    sys.exit(int(sys.argv[4]))
time.sleep(float(sys.argv[5]))
"""


def launch(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    (folder / "worker_of_a_test.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "bigtune.launch.workers", "2", "2950", "worker_of_a_test", str(folder), *words]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"})


def told(folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """What the workers found, once they have begun."""
    ends = time.monotonic() + 60
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    while not all(file.exists() for file in files):
        assert time.monotonic() < ends
        time.sleep(0.02)
    return [json.loads(file.read_text()) for file in files]


def test_workers_are_told_what_deepspeeds_launcher_would_tell_them(tmp_path: Path) -> None:
    assert launch(tmp_path, "-", "0", "0").wait(60) == 0
    for rank, found in enumerate(told(tmp_path)):
        assert found["words"] == [f"--local_rank={rank}", str(tmp_path), "-", "0", "0"]
        assert (found["RANK"], found["LOCAL_RANK"], found["CROSS_RANK"]) == (str(rank), str(rank), "0")
        assert (found["WORLD_SIZE"], found["LOCAL_SIZE"]) == ("2", "2")
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "2950")


def test_if_one_fails_the_others_end_and_its_code_is_told(tmp_path: Path) -> None:
    process = launch(tmp_path, "1", "75", "600")
    first = told(tmp_path)[0]
    assert process.wait(60) == 75
    assert not psutil.pid_exists(int(first["pid"]))


def test_one_that_is_killed_is_told_by_its_signal(tmp_path: Path) -> None:
    process = launch(tmp_path, "-", "0", "600")
    first, second = told(tmp_path)
    os.kill(int(second["pid"]), signal.SIGKILL)
    assert process.wait(60) == 256 - signal.SIGKILL
    assert not psutil.pid_exists(int(first["pid"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_if_the_launcher_is_told_to_end_all_do(tmp_path: Path, number: int) -> None:
    process = launch(tmp_path, "-", "0", "600")
    workers = told(tmp_path)
    process.send_signal(number)
    assert process.wait(60) == 1
    assert not any(psutil.pid_exists(int(worker["pid"])) for worker in workers)
