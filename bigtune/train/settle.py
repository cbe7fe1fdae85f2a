"""The checkpoint that all ranks go on from: whole over all hosts, read and compared with its checksums.

With shared storage every rank sees the same files. Without, each host has the small ones and its ranks' own (and a
neighbour's, with `checkpoint.replicas`); a host that is new gets what it needs from the others.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtune import dist
from bigtune.checkpoint.check import find_problems
from bigtune.checkpoint.disks import Disks, bring
from bigtune.checkpoint.folder import latest_step, step_folder, steps_in
from bigtune.checkpoint.manifest import FILE, Manifest, missing_or_cut
from bigtune.config import Run
from bigtune.dist import World
from bigtune.errors import CheckpointError
from bigtune.train.start import named, none_whole

MOST_TOLD = 3
"""Problems that one line tells."""


def settle_start(
    run: Run, resume: str | None, disks: Disks, world: World, group: Any, say: Callable[[str], None]
) -> Path | None:
    """The newest whole checkpoint, or the one that is named; None for the beginning. Collectively.

    Each file is read by one rank of a disk. Hosts that lack the small files get them.

    Args:
        resume: as `find_start` has it.
        say: told of each newer checkpoint that is not whole, and why.

    Raises:
        CheckpointError: on every rank; the one that is named, or every one, is not whole.
    """
    problems = {}
    for folder in _offered(run, resume, group):
        problem = _problem(folder, disks, world, group)
        if problem is None:
            return folder
        problems[folder] = problem
        say(f"{folder.name} is not whole: {problem}")
    if problems:
        raise none_whole(problems)
    return None


def _offered(run: Run, resume: str | None, group: Any) -> list[Path]:
    """The same on every rank: what the hosts have between them, the first choice first."""
    if resume is not None and resume != "latest":
        return [named(run, resume)]
    checkpoints = run.output / "checkpoints"
    told = dist.gather((latest_step(checkpoints), list(steps_in(checkpoints))), group)
    newest = max((newest for newest, _ in told if newest is not None), default=-1)
    steps = {step for _, steps in told for step in steps if step <= newest}
    return [step_folder(checkpoints, step) for step in sorted(steps, reverse=True)]


def _problem(folder: Path, disks: Disks, world: World, group: Any) -> str | None:
    """What is wrong with a checkpoint, the same on every rank."""
    writes = disks.writer[world.rank] == world.rank
    told = dist.gather(_manifest(folder) if writes else (None, None), group)
    manifests = [manifest for manifest, _ in told if manifest is not None]
    broken = _by_host([[text] if text else [] for _, text in told], disks)
    if not manifests or broken:
        return broken or f"no host has its {FILE}"
    manifest = manifests[0]
    if len({one.id for one in manifests}) > 1:
        return "the hosts hold different saves of this step"
    lacking = missing_or_cut(folder, manifest)
    everywhere = dist.gather(lacking if writes else None, group)
    lost = _lost(manifest, [found for found in everywhere if found is not None])
    if lost:
        return lost
    if not disks.shared:
        small = [FILE, *(name for name in manifest.files if not manifest.is_of_rank(name))]
        bring(folder, dict.fromkeys(range(world.world_size), small), disks, world, group)
    mates = disks.mates(world.rank)
    present = [name for name in manifest.files if name not in lacking]
    mine = {name: tuple(manifest.files[name].tensors) for name in present[mates.index(world.rank) :: len(mates)]}
    damaged = [f"{found.file} {found.what}" for found in find_problems(folder, manifest, mine, workers=1)]
    return _by_host(dist.gather(damaged, group), disks) or None


def _manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    """That of a host's folder, if it has one, or what is wrong with it."""
    try:
        return (Manifest.read(folder) if folder.is_dir() else None), None
    except CheckpointError as error:
        return None, str(error)


def _lost(manifest: Manifest, lacking: Sequence[Mapping[str, str]]) -> str:
    """The files that no disk has whole, and which host had them."""
    had = {name: host for host, names in manifest.disks.items() for name in names}
    lost = [name for name in manifest.files if all(name in found for found in lacking)]
    told = [f"{name} {lacking[0][name]}" + (f" (host {had[name]} had it)" if name in had else "") for name in lost]
    return _some(told)


def _by_host(problems: Sequence[Sequence[str]], disks: Disks) -> str:
    """What ranks have found, with the hosts where these differ."""
    host = {rank: "" if disks.shared else f"{disks.names[writer]}: " for rank, writer in enumerate(disks.writer)}
    return _some([f"{host[rank]}{text}" for rank, texts in enumerate(problems) for text in texts])


def _some(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - MOST_TOLD} more" if len(texts) > MOST_TOLD else ""
    return "; ".join(texts[:MOST_TOLD]) + more
