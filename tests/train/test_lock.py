"""Two runs never write one folder, and whoever may have it gets it."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from bigtune.errors import LaunchError
from bigtune.train import lock as lock_module
from bigtune.train.lock import RunLock


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "WATCH_SECONDS", 0.6)


def held_by(output: Path, host: str, job: str | None = None, beat: int = 3) -> Path:
    """What a run on another host has left, or keeps."""
    path = output / "train.lock"
    path.write_text(json.dumps({"host": host, "process": 17, "job": job, "beat": beat}))
    return path


def test_a_second_run_on_this_host_is_told_who_has_it(tmp_path: Path) -> None:
    wanted = rf"another run is training in .* \(process {os.getpid()} on {socket.gethostname()}\)"
    with RunLock(tmp_path, {}), pytest.raises(LaunchError, match=wanted), RunLock(tmp_path, {}):
        pass
    with RunLock(tmp_path, {}):  # it is free again
        assert json.loads((tmp_path / "train.lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / "train.lock").exists()


def test_a_batch_job_is_named(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path, {"SLURM_JOB_ID": "4711"}),
        pytest.raises(LaunchError, match="job SLURM_JOB_ID 4711"),
        RunLock(tmp_path, {}),
    ):
        pass


def hold(output: Path) -> None:
    with RunLock(output, {}):
        (output / "held").touch()
        time.sleep(60)


def test_a_killed_run_frees_it(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(LaunchError, match=f"process {process.pid} on"), RunLock(tmp_path, {}):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with RunLock(tmp_path, {}):
        pass


def test_a_run_on_another_host_that_lives_keeps_it(tmp_path: Path) -> None:
    held_by(tmp_path, "elsewhere")
    ended = threading.Event()

    def live() -> None:
        beat = 3
        while not ended.wait(0.05):
            beat += 1
            held_by(tmp_path, "elsewhere", beat=beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(LaunchError, match="process 17 on elsewhere"), RunLock(tmp_path, {}):
            pass
    finally:
        ended.set()
        thread.join()


def test_one_that_died_there_does_not(tmp_path: Path) -> None:
    held_by(tmp_path, "elsewhere")
    began = time.monotonic()
    with RunLock(tmp_path, {}):
        assert time.monotonic() - began >= 0.6  # it was watched
        assert json.loads((tmp_path / "train.lock").read_text())["host"] == socket.gethostname()


def test_a_requeued_job_knows_its_own(tmp_path: Path) -> None:
    held_by(tmp_path, "elsewhere", job="SLURM_JOB_ID 12")
    began = time.monotonic()
    with RunLock(tmp_path, {"SLURM_JOB_ID": "12"}):
        assert time.monotonic() - began < 0.5


def test_clocks_do_not_matter(tmp_path: Path) -> None:
    """A file of tomorrow, or of last year, is watched all the same."""
    for shift in (86_400, -365 * 86_400):
        path = held_by(tmp_path, "elsewhere")
        os.utime(path, (time.time() + shift,) * 2)
        began = time.monotonic()
        with RunLock(tmp_path, {}):
            assert time.monotonic() - began >= 0.6


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff"])
def test_remains_that_cannot_be_read_are_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.lock").write_text(content)
    with RunLock(tmp_path, {}):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"output: .*/file cannot be written"), RunLock(tmp_path / "file", {}):
        pass
