"""A run that fails: started again where that may help, and from where."""

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from bigtune.errors import LaunchError
from bigtune.launch.attempt import Command
from bigtune.launch.fleet import Fleet
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.link import LOCAL
from bigtune.launch.plan import Plan
from bigtune.launch.supervise import Restarts, supervise
from bigtune.process import USERS_ERROR

BEGIN = """
import pathlib, sys
folder = pathlib.Path(sys.argv[2])
starts = folder / "starts"
with starts.open("a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
times = len(starts.read_text().splitlines())
"""


def run(folder: Path, body: str, most: int, steps: Sequence[int] = (0,)) -> bool:
    """One worker that does this; `steps` are what the latest checkpoint is, at each look."""
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "worker_of_a_test.py").write_text(BEGIN + body)
    command = Command(["worker_of_a_test", str(folder), "--resume=step-3"], folder, {"PYTHONPATH": str(folder)})
    host, looks = Host(socket.gethostname(), (0,)), iter(steps)
    with Fleet(LOCAL, str(folder), {}) as fleet:
        restarts = Restarts(most, lambda _: next(looks, steps[-1]))
        return supervise(fleet, [host], lambda hosts: Plan(hosts, "127.0.0.1", 2950), command, Interrupts(), restarts)


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().splitlines()


def test_it_is_started_again_until_it_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "sys.exit(times < 3)", most=2)
    assert starts(tmp_path) == ["--resume=step-3"] * 3  # nothing was saved since
    said = capsys.readouterr().err
    assert said.startswith("rank 0: ended with code 1 without a word (out of memory?); see ")
    assert "starting again from the latest checkpoint (1 of 2; see " in said


def test_what_was_saved_since_is_gone_on_with(tmp_path: Path) -> None:
    assert run(tmp_path, "sys.exit(times < 3)", most=2, steps=(3, 3, 5))
    assert starts(tmp_path) == ["--resume=step-3", "--resume=step-3", "--resume=latest"]


def test_no_more_often_than_allowed_and_what_was_said_is_kept(tmp_path: Path) -> None:
    body = "print('words', file=(folder / 'logs' / 'rank-0.log').open('a')); sys.exit(7)"
    with pytest.raises(LaunchError, match="rank 0: ended with code 7 without a word"):
        run(tmp_path, body, most=1)
    assert len(starts(tmp_path)) == 2
    assert (tmp_path / "logs" / "failure-2" / "why.txt").read_text().startswith("first: rank 0 on ")
    assert next((tmp_path / "logs" / "failure-1").glob("rank-0-*.log")).read_text() == "words\n"


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    body = f"(folder / 'logs' / 'rank-0.error').write_text('data.jsonl, row 3: no text'); sys.exit({USERS_ERROR})"
    with pytest.raises(LaunchError, match=r"rank 0: data\.jsonl, row 3: no text"):
        run(tmp_path, body, most=5)
    assert len(starts(tmp_path)) == 1
