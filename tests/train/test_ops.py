"""DeepSpeed's operators: built only where needed, once, and never in the way of a start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Optim
from bigtune.train.ds_config import read_preset
from bigtune.train.ops import cache_folder, ensure_ops, needed_ops

ENSURE = "from bigtune.train.ops import ensure_ops; print(ensure_ops(['cpu_adam'], print))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def test_only_adam_states_in_host_memory_need_one() -> None:
    assert needed_ops(read_preset("zero3"), Optim(name="adamw")) == []
    others: tuple[Any, ...] = ("adamw_8bit", "lion_8bit", "sgd", "adam")
    assert all(needed_ops(read_preset("zero3_offload"), Optim(name=name)) == [] for name in others)
    assert needed_ops(read_preset("zero3_offload"), Optim(name="adamw")) == ["cpu_adam"]


def test_nothing_needed_builds_and_says_nothing(cache: Path) -> None:
    said: list[str] = []
    assert ensure_ops([], said.append)
    assert not said
    assert not cache.exists()


def test_without_a_compiler_a_line_says_what_serves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    assert not ensure_ops(["cpu_adam"], said.append)
    assert len(said) == 1
    assert "torch's fused AdamW serves" in said[0]


def test_a_build_that_fails_is_not_tried_at_every_start(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    said: list[str] = []
    assert not ensure_ops(["cpu_adam"], said.append)
    assert not ensure_ops(["cpu_adam"], said.append)
    assert [line.startswith("ops: building") for line in said] == [True, False, False]


@pytest.mark.slow
def test_a_killed_build_does_not_hang_the_next_start(cache: Path) -> None:
    """What a killed build leaves, torch's lock file among it, is cleared; the library is then built once."""
    first = subprocess.Popen([sys.executable, "-c", ENSURE], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (cache / "cpu_adam" / "lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert (cache / "cpu_adam" / "lock").exists()
    again = [
        subprocess.run([sys.executable, "-c", ENSURE], capture_output=True, text=True, timeout=300).stdout
        for _ in range(2)
    ]
    assert "building" in again[0]
    assert again[0].endswith("True\n")
    assert again[1] == "True\n"
