"""What befalls checkpoints on disks: every damage is found before anything is trained, named, and passed over."""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bigtune import dist
from bigtune.checkpoint import folder as folder_module
from bigtune.checkpoint.disks import find_disks
from bigtune.checkpoint.folder import LATEST, clear_remains, latest_step, point_at, put_in_place
from bigtune.checkpoint.manifest import Manifest
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.dist import World
from bigtune.errors import BigtuneError, CheckpointError
from bigtune.tensorfile import read_header
from bigtune.train.settle import settle_start
from bigtune.train.start import find_start
from tests.disk import read_only
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import RANKS, Trained, differing, metrics, step, train, train_on_rank

STEPS = 4
RANK_FILE = "rank-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two checkpoints, steps 2 and 4, of an 8-bit run with adapters: it has every kind of file."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    settings = {
        "train__steps": STEPS, "checkpoint__every_steps": 2, "data__store": str(folder / "store"),
        "adapter": {"rank": 2},
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    train(run)
    return Trained(folder, settings, run)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Run:
    """Another copy of it, to be damaged."""
    shutil.copytree(trained.run.output, tmp_path / "run")
    return trained.another(tmp_path / "run")


def settle_on_rank(run: Run, resume: str | None) -> tuple[str, list[str]]:
    """What all ranks agree on, and what they say of the rest."""
    world, group = World.from_environment(), dist.own_group()
    said: list[str] = []
    try:
        disks = find_disks(run.output / "checkpoints", world, group)
        return str(settle_start(run, resume, disks, world, group, said.append)), said
    except BigtuneError as error:
        return str(error), said


def settle(run: Run, resume: str | None = None) -> tuple[str, list[str]]:
    """The same on every rank."""
    first: tuple[str, list[str]]
    first, *others = run_distributed(settle_on_rank, RANKS, run, resume)
    assert all(other == first for other in others)
    return first


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_is_taken(run: Run) -> None:
    assert settle(run) == (str(step(run, 4)), [])
    assert settle(run, "step-2") == (str(step(run, 2)), [])
    assert settle(run, "latest") == (str(step(run, 4)), [])


def small_files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"
    )


def test_a_flipped_byte_in_any_small_file_is_named(run: Run) -> None:
    names = small_files(step(run, 4))
    assert {"layout.json", "manifest.json", "trainer.json", "data.json", "run.yaml", "adapter.json"} < set(names)
    assert {"model/config.json", "model/tokenizer.json"} < set(names)
    for name in names:
        path = step(run, 4) / name
        content = path.read_bytes()
        flip(path, len(content) // 2)
        found, said = settle(run)
        assert found == str(step(run, 2)), name
        assert len(said) == 1
        assert said[0].startswith("step-4 is not whole: ")
        assert name in said[0]
        assert "is damaged" in said[0]
        path.write_bytes(content)
    assert settle(run) == (str(step(run, 4)), [])


def test_a_flipped_byte_in_any_tensor_is_named_with_the_tensor(run: Run) -> None:
    path = step(run, 4) / RANK_FILE
    places, _, start = read_header(path)
    assert {name.split(".")[1] for name in places} == {"master", "state1", "state2", "absmax1", "absmax2"}
    content = path.read_bytes()
    for name, place in places.items():
        flip(path, place.offset + place.nbytes - 1)
        found, said = settle(run)
        assert found == str(step(run, 2))
        assert said == [f"step-4 is not whole: {RANK_FILE} is damaged in tensor {name}"]
        path.write_bytes(content)
    flip(path, start - 20)
    assert RANK_FILE in settle(run)[1][0]


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda path: path.unlink(), f"{RANK_FILE} is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), f"{RANK_FILE} has "),
        (lambda path: os.truncate(path, 0), f"{RANK_FILE} has 0 bytes of "),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), f"{RANK_FILE} cannot be read"),
        (lambda path: shutil.copy(path.parent.parent / "step-2" / path.name, path), f"{RANK_FILE} is of another save"),
        (lambda path: shutil.copy(path.parent.parent / "step-2/manifest.json", path.parent), "is of another save"),
        (lambda path: (path.parent / "manifest.json").unlink(), "no manifest.json"),
        (lambda path: (path.parent / "manifest.json").write_text("{}"), "manifest.json: is damaged"),
        (lambda path: (path.parent / "layout.json").unlink(), "layout.json is missing"),
        (lambda path: (path.parent / "model/config.json").unlink(), "model/config.json is missing"),
    ],
)  # fmt: skip
def test_what_is_missing_cut_or_of_another_run_is_named(run: Run, damage: Any, wanted: str) -> None:
    damage(step(run, 4) / RANK_FILE)
    found, said = settle(run)
    assert found == str(step(run, 2))
    assert wanted in said[0]
    message, _ = settle(run, "step-4")
    assert "is not whole" in message or "is no checkpoint" in message
    assert wanted in message
    assert "\n" not in message


def test_the_other_ranks_manifest_of_another_run_is_told(run: Run, trained: Trained, tmp_path: Path) -> None:
    """The same run once more: every file is as long, and none is of this save."""
    other = trained.another(tmp_path / "other")
    train(other)
    assert differing(step(run, 4), step(other, 4)) == []
    shutil.copy(step(other, 4) / "manifest.json", step(run, 4))
    assert "is of another save than the manifest" in settle(run)[1][0]


def test_nothing_whole_is_an_error_and_not_a_new_beginning(run: Run) -> None:
    for number in (2, 4):
        (step(run, number) / RANK_FILE).unlink()
    message, said = settle(run)
    assert len(said) == 2
    assert f"{step(run, 4)} is not whole ({RANK_FILE} is missing), nor is any of the 1 before; bring" in message
    with pytest.raises(CheckpointError, match="is not whole"):
        find_start(run, None)


def test_the_launcher_passes_over_what_it_can_see(run: Run) -> None:
    os.truncate(step(run, 4) / RANK_FILE, 100)
    assert find_start(run, None) == step(run, 2)
    with pytest.raises(CheckpointError, match="step-4 is not whole"):
        find_start(run, "step-4")


def test_training_goes_on_from_the_step_before_and_repairs_the_run(run: Run, trained: Trained) -> None:
    flip(step(run, 4) / RANK_FILE, step(run, 4).joinpath(RANK_FILE).stat().st_size - 5)
    train(run)
    assert metrics(run) == metrics(trained.run)
    assert differing(step(run, 4), step(trained.run, 4)) == []
    assert "step-4 is not whole" in (run.output / "logs/rank-0.log").read_text()
    assert settle(run) == (str(step(run, 4)), [])


@pytest.mark.parametrize("content", [b"step-9\n", b"", b"step-\n", b"\xff\xfe", b"step-4x", b"../step-4\n"])
def test_a_pointer_that_names_no_step_is_told_with_the_mend(run: Run, content: bytes) -> None:
    (step(run, 4).parent / LATEST).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"latest: names .*; write (another step's name|a name such as)"
    ) as caught:
        find_start(run, None)
    assert "\n" not in str(caught.value)


def test_a_read_only_folder_is_told(run: Run) -> None:
    with read_only(step(run, 4).parent):
        said = run_distributed(train_on_rank, RANKS, run.model_copy(update={"output": run.output}), None, None)
    assert len(set(said)) == 1
    assert said[0].startswith("CheckpointError: ")
    assert "cannot write there" in said[0]


# --------------------------------------------------------------------------------- a crash at any moment


class Crash(BaseException):
    """As if the process was killed there."""


def crash_in(name: str, number: int) -> Any:
    """The function of the folder module fails at its n-th call, before it does anything."""
    original, calls = getattr(folder_module, name), iter(range(1000))

    def dying(*arguments: Any) -> Any:
        if next(calls) == number:
            raise Crash
        return original(*arguments)

    return mock.patch.object(folder_module, name, dying)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("at", ["rename 0", "rename 1", "sync 0", "sync 1", "sync 2", "replace 0", "rmtree 0"])
def test_a_crash_between_any_two_moves_leaves_a_whole_checkpoint(tmp_path: Path, replaces: bool, at: str) -> None:
    """Of a step that is new, or that replaces one; `latest` names the one before, or the new one."""

    def made(name: str, text: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(text)
        return tmp_path / name

    point_at(made("step-2", "old"))
    if replaces:
        made("step-4", "abandoned")
    aside = made("step-4.partial", "new")
    name, number = at.split()
    try:
        with crash_at(name, int(number)):
            put_in_place(aside, tmp_path / "step-4")
            point_at(tmp_path / "step-4")
    except Crash:
        pass
    named = latest_step(tmp_path)
    assert named in (2, 4)
    assert (tmp_path / f"step-{named}" / "content").read_text() == {2: "old", 4: "new"}[named or 0]
    clear_remains(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    if (tmp_path / "step-4").exists():
        assert (tmp_path / "step-4" / "content").read_text() in ("new", "abandoned")


def crash_at(name: str, number: int) -> Any:
    if name == "sync":
        return crash_in("sync", number)
    calls = iter(range(1000))
    owner: Any = shutil if name == "rmtree" else Path
    original = getattr(owner, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise Crash
        return original(*arguments, **options)

    return mock.patch.object(owner, name, dying)


def test_a_manifest_knows_its_own_damage(run: Run) -> None:
    path = step(run, 4) / "manifest.json"
    whole = path.read_text()
    assert Manifest.read(step(run, 4)).id in whole
    path.write_text(whole.replace('"size": ', '"size": 1', 1))
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged, or was edited"):
        Manifest.read(step(run, 4))
