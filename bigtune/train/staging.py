"""The copy of a rank's state that is written while the training goes on."""

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from bigtune import dist
from bigtune.dist import World

SPARE = 0.8
"""Of the memory that is free, what copies may take: the training's own needs rise and fall."""
CGROUP = Path("/sys/fs/cgroup")


class Staging:
    """Host memory for one copy, used again by every save: its pages are new only once."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A copy of each tensor in the host's memory; valid until the next call."""
        copies = {name: self._room(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._held = copies
        return copies

    def fits(self, tensors: Mapping[str, torch.Tensor], world: World) -> bool:
        """Whether there is memory for a copy on every rank's host, collectively."""
        more = sum(tensor.nbytes for name, tensor in tensors.items() if not _alike(tensor, self._held.get(name)))
        return dist.all_max(float(more * world.local_size > SPARE * free_memory())) == 0.0

    def _room(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        held = self._held.get(name)
        if _alike(tensor, held):
            assert held is not None
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _alike(tensor: torch.Tensor, held: torch.Tensor | None) -> bool:
    return held is not None and held.dtype == tensor.dtype and held.shape == tensor.shape


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
