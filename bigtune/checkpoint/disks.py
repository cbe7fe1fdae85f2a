"""Which ranks share a checkpoints folder, and files that one host has and another needs.

With shared storage all ranks see one folder. With node-local disks each host has a folder of its own under the same
path, in which its ranks' files lie and a copy of everything small.
"""

import os
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from bigtune import dist
from bigtune.checkpoint.folder import PARTIAL, sync
from bigtune.dist import World
from bigtune.errors import CheckpointError

PIECE_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Disks:
    """`writer` is the first rank of each rank's disk, which writes what is written once a disk; `names` are by it."""

    writer: tuple[int, ...]
    names: Mapping[int, str]

    @property
    def shared(self) -> bool:
        """Whether all ranks see one folder."""
        return len(self.names) == 1

    def mates(self, rank: int) -> list[int]:
        """The ranks that see what a rank sees."""
        return [other for other, writer in enumerate(self.writer) if writer == self.writer[rank]]

    def neighbour(self, rank: int) -> int:
        """The writer of the next disk, round."""
        writers = list(self.names)
        return writers[(writers.index(self.writer[rank]) + 1) % len(writers)]


def find_disks(checkpoints: Path, world: World, group: Any = None) -> Disks:
    """Find out by files that every rank makes and the others look for, collectively.

    Raises:
        CheckpointError: on every rank; the folder cannot be written.
    """
    nonce = dist.from_main_text(uuid.uuid4().hex[:12], group)

    def token(rank: int) -> Path:
        return checkpoints / f".seen-{nonce}-{rank}{PARTIAL}"

    def leave() -> None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        token(world.rank).touch()

    problem = dist.first_problem(leave, OSError, group=group)
    if problem:
        raise CheckpointError(f"{checkpoints}: rank {problem.rank} cannot write there: {problem.text}")
    writer = next(rank for rank in range(world.rank + 1) if token(rank).exists())
    told = dist.gather((writer, socket.gethostname()), group)
    token(world.rank).unlink(missing_ok=True)
    writers = tuple(writer for writer, _ in told)
    hosts = {rank: told[rank][1] for rank in sorted(set(writers))}
    twice = len(set(hosts.values())) < len(hosts)
    return Disks(writers, {rank: f"{host} (rank {rank})" if twice else host for rank, host in hosts.items()})


def bring(folder: Path, needed: Mapping[int, Collection[str]], disks: Disks, world: World, group: Any) -> int:
    """Copy files over the network to the disks that lack and need them, collectively.

    Args:
        needed: names of files, by the rank that needs them.

    Returns:
        How many bytes came to any disk.

    Raises:
        CheckpointError: on every rank; nobody has a file, or it could not be written.
    """
    wanted = sorted({name for names in needed.values() for name in names})
    has = dist.gather([name for name in wanted if (folder / name).is_file()], group)
    moved = 0
    for name in wanted:
        receivers = sorted({disks.writer[rank] for rank, names in needed.items() if name in names})
        receivers = [rank for rank in receivers if name not in has[rank]]
        if receivers:
            sender = next((rank for rank, names in enumerate(has) if name in names), None)
            if sender is None:
                raise CheckpointError(f"{folder}: no host has {name}; resume from another step")
            moved += _copy(folder / name, sender, receivers, world, group) * len(receivers)
    return moved


def _copy(path: Path, sender: int, receivers: list[int], world: World, group: Any) -> int:
    size = int(dist.all_sum([path.stat().st_size if world.rank == sender else 0], group)[0])
    aside = path.with_name(path.name + PARTIAL)

    def pass_on() -> None:
        if world.rank == sender:
            transfer(Parcel(path, size, receivers), None, group)
        elif world.rank in receivers:
            path.parent.mkdir(parents=True, exist_ok=True)
            transfer(None, Parcel(aside, size, [sender]), group)
            aside.replace(path)
            sync(path.parent)

    problem = dist.first_problem(pass_on, OSError, group=group)
    if problem:
        raise CheckpointError(f"{path}: could not be copied from another host (rank {problem.rank}: {problem.text})")
    return size


@dataclass(frozen=True, slots=True)
class Parcel:
    """A file of so many bytes, and the ranks that it goes to or the one that it comes from."""

    path: Path
    size: int
    ranks: Sequence[int]


def transfer(sent: Parcel | None, received: Parcel | None, group: Any) -> None:
    """Send a file and receive another at once, piece by piece; where one cannot be read or written, the exchange goes
    on to its end all the same, so that nobody waits for ever.

    Raises:
        OSError: a file could not be read or written.
    """
    trouble: list[OSError] = []
    source = target = None
    with ExitStack() as stack:
        with _noted(trouble):
            source = stack.enter_context(sent.path.open("rb")) if sent else None
            target = stack.enter_context(received.path.open("wb")) if received else None
        for start in range(0, max(parcel.size for parcel in (sent, received) if parcel), PIECE_BYTES):
            under_way = []
            if sent and start < sent.size:
                piece = bytearray(min(PIECE_BYTES, sent.size - start))
                with _noted(trouble):
                    source.readinto(piece) if source else None
                content = torch.frombuffer(piece, dtype=torch.uint8)
                under_way = [distributed.isend(content, rank, group) for rank in sent.ranks]
            if received and start < received.size:
                content = torch.empty(min(PIECE_BYTES, received.size - start), dtype=torch.uint8)
                distributed.recv(content, received.ranks[0], group)
                with _noted(trouble):
                    target.write(content.numpy().data) if target and not trouble else None
            for work in under_way:
                if work is not None:  # None is for ranks outside the group
                    work.wait()
        if target and not trouble:
            with _noted(trouble):
                target.flush()
                os.fsync(target.fileno())
    if trouble:
        raise trouble[0]


@contextmanager
def _noted(trouble: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        trouble.append(error)
