"""What a benchmark ran on: hardware, versions, bigtune's commit, and how much of the processor others used."""

import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from bigtune import __version__
from bigtune.launch.local import gpus

PACKAGES = ("torch", "deepspeed", "transformers")


def machine() -> dict[str, Any]:
    """What ran it, and with which versions; torch is not imported here unless there is a GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    devices = gpus()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_bfloat16": [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _name_of_gpu() if devices else None,
        "gpus": len(devices),
        "python": platform.python_version(),
        "bigtune": __version__,
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def _name_of_gpu() -> str:
    """Asked for in a process of its own: whoever asks holds some of the GPU's memory from then on."""
    code = "import torch; print(torch.cuda.get_device_name(0))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str | None:
    """The commit of bigtune's own checkout, with `-dirty` where files differ from it; None where it is installed."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # another project's repository, in which bigtune is installed
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


class OthersLoad:
    """How busy other processes keep this process's cores, from its making on."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Of the cores' time, 0 to 1; that of children counts as one's own once they have ended. None where the system
        does not tell."""
        seconds = (time.monotonic() - self._began) * len(os.sched_getaffinity(0))
        busy = _busy_seconds() - self._busy
        if busy <= 0:
            return None
        return min(1.0, max(0.0, (busy - (_own_seconds() - self._own)) / seconds))


def _busy_seconds() -> float:
    """Seconds that the cores which this process may use have worked, for whomever; a hypervisor's own count too."""
    cores, mine = psutil.cpu_times(percpu=True), os.sched_getaffinity(0)
    used = [cores[i] for i in mine if i < len(cores)]
    return sum(sum(core) - core.idle - core.iowait - core.guest - core.guest_nice for core in used)


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
