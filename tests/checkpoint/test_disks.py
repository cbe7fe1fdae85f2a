"""Hosts without shared storage: each rank here works in a folder of its own, under the same relative path."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bigtune import dist
from bigtune.checkpoint.disks import Parcel, find_disks, transfer
from bigtune.checkpoint.folder import latest_step
from bigtune.checkpoint.manifest import Manifest
from bigtune.checkpoint.merge import merge
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.dist import World
from bigtune.errors import CheckpointError
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import metrics, tensors, train_on_rank

STEPS = 4
OUTPUT = Path("run")


def host(folder: Path, rank: int, hosts: int) -> Path:
    """Where a rank's host has its files: two ranks a host, where there are fewer hosts than ranks."""
    return folder / f"host-{rank % hosts}"


def train_on_host(folder: Path, run: Run, hosts: int, *arguments: Any) -> str:
    before, here = Path.cwd(), host(folder, World.from_environment().rank, hosts)
    here.mkdir(exist_ok=True)
    os.chdir(here)
    try:
        return train_on_rank(run, *arguments)
    finally:
        os.chdir(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    run = run_of(tmp_path)
    prepare(run.data, run.model.path, run.store)
    return tmp_path


def run_of(folder: Path, **changes: Any) -> Run:
    settings = {
        "data__store": str(folder / "store"), "train__steps": STEPS, "checkpoint__every_steps": 2,
        "optim__name": "adamw", "optim__schedule": "constant", "output": str(OUTPUT),
    }  # fmt: skip
    return tiny_run(folder, **{**settings, **changes})


def train(folder: Path, run: Run, ranks: int = 2, hosts: int = 2, resume: str | None = None) -> None:
    assert run_distributed(train_on_host, ranks, folder, run, hosts, None, resume) == [""] * ranks


def checkpoint(folder: Path, number: int, step: int = STEPS) -> Path:
    return folder / f"host-{number}" / OUTPUT / "checkpoints" / f"step-{step}"


def log(folder: Path, rank: int = 0, hosts: int = 2) -> str:
    return (host(folder, rank, hosts) / OUTPUT / "logs" / f"rank-{rank}.log").read_text()


def rank_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("rank-*"))


def test_each_host_has_its_ranks_files_and_all_that_is_small(folder: Path) -> None:
    train(folder, run_of(folder), ranks=3)  # ranks 0 and 2 on the first host, 1 on the second
    first, second = checkpoint(folder, 0), checkpoint(folder, 1)
    assert rank_files(first) == ["rank-00000-of-00003.safetensors", "rank-00002-of-00003.safetensors"]
    assert rank_files(second) == ["rank-00001-of-00003.safetensors"]
    small = {str(path.relative_to(first)) for path in first.rglob("*") if not path.name.startswith("rank-")}
    assert small == {str(path.relative_to(second)) for path in second.rglob("*") if not path.name.startswith("rank-")}
    assert Manifest.read(first) == Manifest.read(second)
    assert sorted(map(sorted, Manifest.read(first).disks.values())) == [rank_files(first), rank_files(second)]
    assert all(latest_step(path.parent) == STEPS for path in (first, second))
    assert "2 hosts without shared storage, each with its ranks' shards alone: a host that dies" in log(folder)


def test_it_goes_on_on_other_ranks_with_shards_from_other_hosts(folder: Path) -> None:
    train(folder, run_of(folder))
    shared = run_of(folder, output=str(folder / "shared"), train__steps=2 * STEPS)
    assert run_distributed(train_on_rank, 2, shared) == ["", ""]
    train(folder, run_of(folder, train__steps=2 * STEPS), ranks=3)
    found = metrics(run_of(folder, output=str(folder / "host-0" / OUTPUT)))
    for line, other in zip(found, metrics(shared), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert "came from other hosts" in log(folder)


def test_a_step_that_is_not_whole_everywhere_is_passed_over(folder: Path) -> None:
    """The hosts agree on the newest one that is; the line says which file is lost, and who had it."""
    train(folder, run_of(folder))
    (checkpoint(folder, 1) / "rank-00001-of-00002.safetensors").unlink()
    train(folder, run_of(folder, train__steps=STEPS + 2))
    said = log(folder)
    assert "step-4 is not whole: rank-00001-of-00002.safetensors is missing (host " in said
    assert " (rank 1) had it)" in said
    assert "going on from run/checkpoints/step-2" in said


def test_who_named_that_step_is_told_and_nothing_is_trained(folder: Path) -> None:
    train(folder, run_of(folder))
    (checkpoint(folder, 1) / "rank-00001-of-00002.safetensors").unlink()
    said = run_distributed(train_on_host, 2, folder, run_of(folder, train__steps=6), 2, None, "step-4")
    assert said[0] == said[1]
    assert said[0].startswith("CheckpointError: run/checkpoints/step-4 is not whole (rank-00001-of-00002")


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_dead_hosts_shards_are_a_neighbours_only_where_asked_for(folder: Path, replicas: int) -> None:
    """Its disk is gone; a new host takes its place."""
    train(folder, run_of(folder, checkpoint__replicas=replicas))
    before = {number: tensors(checkpoint(folder, number)) for number in range(2)}
    assert len(rank_files(checkpoint(folder, 0))) == 1 + replicas
    shutil.rmtree(folder / "host-1")
    run = run_of(folder, checkpoint__replicas=replicas, train__steps=STEPS + 1)
    said = run_distributed(train_on_host, 2, folder, run, 2)
    if replicas:
        assert said == ["", ""]
        assert "going on from run/checkpoints/step-4, of which" in log(folder)
        own, again = rank_files(checkpoint(folder, 1))[0], tensors(checkpoint(folder, 1))
        assert own == "rank-00001-of-00002.safetensors"
        assert all(bool((before[1][name] == value).all()) for name, value in again.items())
    else:
        assert said[0].startswith("CheckpointError: run/checkpoints/step-4 is not whole (rank-00001-of-00002")


def test_a_copy_equals_what_it_is_a_copy_of(folder: Path) -> None:
    train(folder, run_of(folder, checkpoint__replicas=1), ranks=3)
    names = [f"rank-{rank:05d}-of-00003.safetensors" for rank in range(3)]
    for number in range(2):
        assert rank_files(checkpoint(folder, number)) == names
    for name in names:
        assert (checkpoint(folder, 0) / name).read_bytes() == (checkpoint(folder, 1) / name).read_bytes()
    merge(checkpoint(folder, 1), folder / "merged")  # the second host alone has it all


def disks_on_rank(folder: Path, hosts: int) -> Any:
    world = World.from_environment()
    return find_disks(host(folder, world.rank, hosts) / "checkpoints", world, dist.own_group())


def test_ranks_find_out_who_shares_a_folder(tmp_path: Path) -> None:
    for hosts, writers in ((1, (0, 0, 0)), (2, (0, 1, 0)), (3, (0, 1, 2))):
        found = run_distributed(disks_on_rank, 3, tmp_path / str(hosts), hosts)
        assert [one.writer for one in found] == [writers] * 3
        assert found[0].shared is (hosts == 1)
        assert not list(tmp_path.rglob("*.partial"))
    assert [found[0].neighbour(rank) for rank in range(3)] == [1, 2, 0]


def transfer_on_rank(folder: Path, size: int, broken: bool) -> str:
    """Rank 0 sends a file to rank 1, and it another one back, of twice the size."""
    rank, group = World.from_environment().rank, dist.own_group()
    own, other = folder / str(rank), folder / f"{1 - rank}-copy"
    own.write_bytes(os.urandom(size * (1 + rank)))
    if broken:
        other = folder / "none" / "other"
    try:
        transfer(Parcel(own, size * (1 + rank), [1 - rank]), Parcel(other, size * (2 - rank), [1 - rank]), group)
    except OSError as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("size", [0, 1, 2**24, 2**24 + 7])
def test_files_cross_the_network_both_ways_at_once(tmp_path: Path, size: int) -> None:
    assert run_distributed(transfer_on_rank, 2, tmp_path, size, False) == ["", ""]
    for rank in range(2):
        assert (tmp_path / str(rank)).read_bytes() == (tmp_path / f"{rank}-copy").read_bytes()
    assert run_distributed(transfer_on_rank, 2, tmp_path, size, True) == ["FileNotFoundError"] * 2


def unwritable_on_rank(folder: Path) -> str:
    world = World.from_environment()
    try:
        find_disks(folder, world, dist.own_group())
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run_distributed(unwritable_on_rank, 2, tmp_path / "file")
    assert said[0] == said[1]
    assert "cannot write there" in said[0]
