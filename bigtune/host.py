"""What this host has left."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_memory(root: Path = CGROUP) -> int:
    """Bytes that this host, or the control group that a batch system put the job into, has left."""
    free = int(psutil.virtual_memory().available)
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rsplit(":", 1)[-1].lstrip("/")
        for folder in (root / own, *(root / own).parents):
            if folder.is_relative_to(root) and (folder / "memory.max").is_file():
                limit = (folder / "memory.max").read_text().strip()
                if limit != "max":
                    used = int((folder / "memory.current").read_text()) - _of_files(folder)
                    free = min(free, int(limit) - used)
    except (OSError, ValueError):  # another version of control groups, or none
        pass
    return max(0, free)


def _of_files(folder: Path) -> int:
    """Bytes of a group's cached files, which the kernel drops when others need them."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
