"""Write a checkpoint: aside, with checksums, renamed, and only then `latest`.

    start ─▶ every rank its file ─▶ (copies to a neighbour) ─▶ small files, manifest ─▶ rename ─▶ latest

Nothing is gathered but names and checksums. Each arrow is crossed by all ranks together: whatever fails, on whichever
rank, every rank learns of it, the remains are removed and the checkpoint before stays the latest. The same runs in the
training's own thread or in one beside it, over a group of its own (`dist.own_group`).
"""

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigtune import dist
from bigtune.checkpoint.disks import PIECE_BYTES, Disks, Parcel, transfer
from bigtune.checkpoint.folder import PARTIAL, point_at, put_in_place, rank_file, step_folder, sync
from bigtune.checkpoint.layout import Layout
from bigtune.checkpoint.manifest import ID, Manifest, missing_or_cut
from bigtune.dist import World
from bigtune.errors import CheckpointError
from bigtune.model.shards import NAMES, memory_of
from bigtune.tensorfile import Content, Sums, sums_of, write, write_image


@dataclass(frozen=True, slots=True)
class Where:
    """Into which folder, from which place among the ranks, and how many neighbours get a copy of a rank's file."""

    checkpoints: Path
    world: World
    disks: Disks
    replicas: int = 0
    group: Any = None


def save(
    where: Where,
    step: int,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    model_files: Mapping[str, bytes],
    image: memoryview | None = None,
) -> Path:
    """Save all ranks' partitions as step-N, collectively.

    Args:
        layout: who holds which elements, the same on every rank.
        tensors: this rank's, by the names that they have in its file.
        texts: small files by name, such as trainer.json.
        model_files: what makes a model of the weights, by name: config, tokenizer and their like.
        image: the tensors' bytes, where they lie end to end as `tensorfile.write_image` has them.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write; names the rank and its reason.
    """
    folder = step_folder(where.checkpoints, step)
    aside = folder.with_name(folder.name + PARTIAL)
    rank, writes = where.world.rank, where.disks.writer[where.world.rank] == where.world.rank
    written: dict[str, Sums] = {}

    def together(action: Callable[[], None], writers_only: bool = True) -> None:
        doing = action if writes or not writers_only else _nothing
        problem = dist.first_problem(doing, OSError, CheckpointError, group=where.group)
        if problem:
            raise _given_up(aside, problem, remove=writes)

    def write_rank() -> None:
        path = rank_file(aside, rank, layout.world_size)
        contents = {name: content_of(tensor) for name, tensor in tensors.items()}
        metadata = {ID: saved_as, "step": str(step), "rank": str(rank)}
        if image is None:
            written[path.name] = write(path, contents, metadata)
        else:
            written[path.name] = write_image(path, contents, image, metadata)

    def write_shared() -> None:
        layout.write(aside)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        (aside / "model").mkdir()
        for name, content in model_files.items():
            (aside / "model" / name).write_bytes(content)
        small = [path for path in aside.rglob("*") if path.is_file() and not path.name.startswith("rank-")]
        sums = {str(path.relative_to(aside)): sums_of(path) for path in small}
        for path in (*small, aside / "model"):
            sync(path)
        manifest = Manifest(saved_as, {**sums, **of_ranks}, files_of)
        manifest.write(aside)
        here = [name for name in of_ranks if not files_of or name in files_of[where.disks.names[rank]]]
        for name, problem in missing_or_cut(aside, manifest, here).items():
            raise CheckpointError(f"{name} {problem}")
        sync(aside)

    saved_as = dist.from_main_text(uuid.uuid4().hex, where.group)
    together(lambda: _start(aside))
    together(write_rank, writers_only=False)
    copies = _replicate(where, aside, layout.world_size, together) if where.replicas else {}
    told = dist.gather(written, where.group)
    of_ranks = {name: sums for files in told for name, sums in files.items()}
    files_of = _files_of(where.disks, [[*files] for files in told], copies)
    together(write_shared)
    together(lambda: put_in_place(aside, folder))
    together(lambda: point_at(folder))
    return folder


def _nothing() -> None:
    """The part of the other ranks where one a disk acts."""


def _given_up(aside: Path, problem: dist.Problem, remove: bool) -> CheckpointError:
    """Remove what was written, and say why it came to nothing."""
    free = shutil.disk_usage(aside.parent).free / 2**30 if aside.parent.is_dir() else 0.0
    if remove:
        shutil.rmtree(aside, ignore_errors=True)
    return CheckpointError(
        f"{aside.with_suffix('')}: could not be saved (rank {problem.rank}: {problem.text}; {free:.2f} GiB free); "
        "the checkpoint before stays the latest; make room and start again to go on from it"
    )


def _start(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def content_of(tensor: torch.Tensor) -> Content:
    """What a file gets of a tensor; brought to the host piece by piece if it is on a device."""
    pieces = Pieces(tensor.detach().contiguous().view(-1))
    return Content(NAMES[tensor.dtype], tuple(tensor.shape), pieces)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Iterable any number of times."""

    flat: torch.Tensor

    def __iter__(self) -> Any:
        step = max(1, PIECE_BYTES // self.flat.element_size())
        for start in range(0, self.flat.numel(), step):
            yield memory_of(self.flat[start : start + step].cpu())


def _replicate(where: Where, aside: Path, world_size: int, together: Callable[..., None]) -> dict[str, list[str]]:
    """Copy the rank files of each disk to the next; names of files by the name of the disk that got them.

    In rounds: in each, one file of every disk goes on.
    """
    disks, rank = where.disks, where.world.rank
    copies: dict[str, list[str]] = {name: [] for name in disks.names.values()}
    for number in range(max(len(disks.mates(writer)) for writer in disks.names)):
        files = {
            writer: rank_file(aside, mates[number], world_size)
            for writer in disks.names
            if number < len(mates := disks.mates(writer))
        }
        for writer, path in files.items():
            copies[disks.names[disks.neighbour(writer)]].append(path.name)
        sizes = dist.gather(files[rank].stat().st_size if rank in files else 0, where.group)
        sent = {w: Parcel(path, sizes[w], [disks.neighbour(w)]) for w, path in files.items()}
        received = {disks.neighbour(w): Parcel(path, sizes[w], [w]) for w, path in files.items()}
        together(partial(transfer, sent.get(rank), received.get(rank), where.group))
    return copies


def _files_of(disks: Disks, written: list[list[str]], copies: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The rank files of each disk by its name; nothing where all are on one."""
    if disks.shared:
        return {}
    files: dict[str, list[str]] = {name: list(copies.get(name, ())) for name in disks.names.values()}
    for rank, names in enumerate(written):
        files[disks.names[disks.writer[rank]]] += names
    return files


def to_prune(steps: list[int], step: int, keep_last: int | None, keep_every: int | None, best: int | None) -> list[int]:
    """Which of the checkpoints up to `step`, which was just saved, go.

    Later ones are of a run that went back: they stay until they are written anew.

    Args:
        keep_last: how many of the newest stay; None for all.
        keep_every: those of every so manieth step stay as well.
        best: the step of the least held-out loss, which stays as well.
    """
    if keep_last is None:
        return []
    older = sorted(number for number in steps if number <= step)[:-keep_last]
    return [number for number in older if number != best and not (keep_every and number % keep_every == 0)]
