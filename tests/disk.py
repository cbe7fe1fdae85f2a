"""A small real file system, to fill."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str = "64k") -> Iterator[Path]:
    """`folder` on a tmpfs of its own; skips the test where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    if _mount("-t", "tmpfs", "-o", f"size={size}", "bigtune-test", str(folder)):
        pytest.skip("this container may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, size: str | int) -> None:
    """Give a small disk another size, in bytes or as `mount` has it."""
    assert _mount("-o", f"remount,size={size}", str(folder)) == 0


def fill(folder: Path) -> None:
    """Leave no byte on a small disk."""
    try:
        with (folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
    except OSError:
        pass


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` as root too may not write it: mounted on itself, read-only."""
    if os.geteuid() != 0 or _mount("--bind", str(folder), str(folder)):
        pytest.skip("mounting needs root, and a container that may")
    try:
        assert _mount("-o", "remount,ro,bind", str(folder)) == 0
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
