"""One host's processes: they are told who they are, end together, and never outlive their launcher."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtune.launch.attempt import Command, Ending, attempt
from bigtune.launch.channel import SILENT_SECONDS
from bigtune.launch.fleet import Fleet
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.link import LOCAL
from bigtune.launch.plan import Plan
from bigtune.process import LOST_OTHERS, STOPPED, USERS_ERROR
from tests.processes import alive, until

HOST = Host("here", (0, 1))
BEGIN = """
import faulthandler, json, os, pathlib, signal, subprocess, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[2])
faulthandler.register(signal.SIGUSR2, file=(folder / "logs" / f"rank-{rank}.log").open("w"), chain=True)
child = subprocess.Popen(["sleep", "600"])
told = {**os.environ, "pid": os.getpid(), "child": child.pid, "words": sys.argv[1:]}
(folder / f"{rank}.part").write_text(json.dumps(told))
(folder / f"{rank}.part").rename(folder / f"{rank}.json")
while not (folder / "1.json").exists():
    time.sleep(0.01)
"""


def told(folder: Path) -> list[dict[str, Any]]:
    """What both workers found, once they have begun."""
    until(lambda: all((folder / f"{rank}.json").exists() for rank in (0, 1)), seconds=30)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def pids(folder: Path) -> list[int]:
    """Of the workers and what they started."""
    return [worker[key] for worker in told(folder) for key in ("pid", "child")]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "logs").mkdir()
    yield tmp_path
    for path in tmp_path.glob("?.json"):
        for key in ("pid", "child"):
            assert not alive(json.loads(path.read_text())[key])


def run(folder: Path, body: str, interrupts: Interrupts | None = None) -> Ending:
    """Two workers that do this."""
    (folder / "worker_of_a_test.py").write_text(BEGIN + textwrap.dedent(body))
    command = Command(["worker_of_a_test", str(folder), "word"], folder, {"PYTHONPATH": str(folder)})
    with Fleet(LOCAL, str(folder), {}) as fleet:
        assert fleet.reach([HOST]) == []
        return attempt(fleet, Plan([HOST], "127.0.0.1", 2950), command, interrupts or Interrupts(), every_rank=False)


def test_workers_are_told_what_other_launchers_tell_them(folder: Path) -> None:
    ending = run(folder, "")
    assert ending.done and ending.first is None
    for rank, found in enumerate(told(folder)):
        assert found["words"] == [f"--local_rank={rank}", str(folder), "word"]
        assert (found["RANK"], found["LOCAL_RANK"], found["CROSS_RANK"]) == (str(rank), str(rank), "0")
        assert (found["WORLD_SIZE"], found["LOCAL_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("2", "2", "2")
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "2950")


def test_if_one_fails_the_others_end_with_their_stacks(folder: Path) -> None:
    ending = run(folder, "def stuck(): time.sleep(600)\nsys.exit(7) if rank else stuck()")
    assert ending.first is not None and (ending.first.rank, ending.first.code) == (1, 7)
    assert ending.first.why() == "ended with code 7 without a word" and ending.again
    other = next(end for end in ending.ends if end.rank == 0)
    assert other.followed and "in stuck" in other.tail


def test_one_that_is_killed_is_told_by_its_signal(folder: Path) -> None:
    ending = run(folder, "time.sleep(600) if rank else os.kill(os.getpid(), signal.SIGKILL)")
    assert ending.first is not None
    assert ending.first.why() == "ended by signal 9 (SIGKILL) without a word"


def test_one_that_ignores_its_end_is_killed(folder: Path) -> None:
    ending = run(folder, "signal.signal(signal.SIGUSR2, signal.SIG_IGN)\nsys.exit(7) if rank else time.sleep(600)")
    assert ending.first is not None and ending.first.rank == 1
    assert next(end for end in ending.ends if end.rank == 0).code == -signal.SIGKILL


def test_the_cause_is_told_apart_from_what_followed_it(folder: Path) -> None:
    body = f"""
    error = folder / "logs" / f"rank-{{rank}}.error"
    if rank == 0:
        error.write_text("rank 1 is lost")
        sys.exit({LOST_OTHERS})
    time.sleep(0.5)
    error.write_text("data.jsonl, row 3: no text")
    sys.exit({USERS_ERROR})
    """
    ending = run(folder, body)
    assert ending.first is not None
    assert (ending.first.rank, ending.first.why()) == (1, "data.jsonl, row 3: no text")
    assert not ending.again


def test_an_interrupted_run_is_no_failure(folder: Path) -> None:
    with Interrupts() as interrupts:
        body = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({STOPPED}))\n"
        body += "if not rank: os.kill(int(os.environ['LAUNCHER']), signal.SIGINT)\n"
        os.environ["LAUNCHER"] = str(os.getpid())
        ending = run(folder, body + "time.sleep(600)", interrupts)
    assert not ending.done and ending.first is None


LAUNCHER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.launch.test_agent import run
run(Path({folder!r}), {body!r})
"""


def start_launcher(folder: Path, body: str) -> "subprocess.Popen[bytes]":
    script = LAUNCHER.format(root=str(Path(__file__).parents[2]), folder=str(folder), body=body)
    return subprocess.Popen([sys.executable, "-c", script])


@pytest.mark.parametrize("body", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"], ids=["asked", "deaf"])
def test_if_the_launcher_is_killed_all_end(folder: Path, body: str) -> None:
    launcher = start_launcher(folder, body + "time.sleep(600)")
    started = pids(folder)
    launcher.kill()
    launcher.wait()
    until(lambda: not any(map(alive, started)), seconds=15)


def test_an_agent_that_hears_nothing_ends_what_it_runs_and_does_what_it_was_told_for_then(folder: Path) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-m", "bigtune.launch.agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert agent.stdin is not None and agent.stdout is not None
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    asked = {"name": "0", "command": command, "environment": {}}
    setup = {"folder": str(folder), "environment": {}, "deserted": ["touch", "deserted"]}
    for order in ({"setup": setup}, {"start": [asked]}):
        agent.stdin.write(json.dumps(order).encode() + b"\n")
        agent.stdin.flush()
    began = time.monotonic()
    said = [json.loads(line) for line in agent.stdout]
    assert SILENT_SECONDS - 1 < time.monotonic() - began < SILENT_SECONDS + 5
    assert {"output": {"name": "0", "text": "begun"}} in said
    assert any("silent" in event.get("leaves", "") for event in said)
    assert agent.wait(10) == 0 and (folder / "deserted").exists()
