"""`bigtune verify` names what is missing, cut, damaged or of another save, and passes what is whole."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bigtune import api
from bigtune.checkpoint.deepspeed import of_deepspeed
from bigtune.checkpoint.manifest import Manifest
from bigtune.checkpoint.merge import merge
from bigtune.cli import main
from bigtune.errors import CheckpointError
from bigtune.tensorfile import sums_of
from tests.checkpoint.made import damage_tensor, flip, make_checkpoint, some_tensors
from tests.checkpoint.test_zerofiles import written

INDEX = "model.safetensors.index.json"
RANK_FILE = "rank-00001-of-00003.safetensors"
FILES, TENSORS = 3 + 6, 3 * 4
"""Of a made checkpoint: ranks' and small ones; a master and a state of two sub-groups on each rank."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's output folder with two checkpoints."""
    for number in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"step-{number}"
        make_checkpoint(folder, some_tensors(), saved_as=f"save {number}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-2\n")
    return tmp_path / "run"


@pytest.fixture
def step(run: Path) -> Path:
    return run / "checkpoints" / "step-2"


@pytest.fixture
def merged(step: Path, tmp_path: Path) -> Path:
    """A model in several files."""
    return merge(step, tmp_path / "merged", shard_bytes=1000)


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def lines(*arguments: str | Path) -> list[str]:
    """Of standard output, where something is wrong."""
    result = verify(*arguments)
    assert result.exit_code == 1
    return result.stdout.splitlines()


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_whole_is_one_line(run: Path, step: Path, merged: Path, workers: int) -> None:
    for path, files, tensors in (
        (step, FILES, TENSORS),
        (run, 2 * FILES, 2 * TENSORS),
        (run / "checkpoints", 2 * FILES, 2 * TENSORS),
        (merged, len([path for path in merged.rglob("*") if path.is_file()]) - 1, len(some_tensors())),
    ):
        result = verify(path, "--workers", str(workers))
        assert (result.exit_code, result.stdout) == (0, f"whole: {files} files, 0.0 GiB, {tensors} tensors\n")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / RANK_FILE).unlink(), f"{RANK_FILE}: is missing"),
    "cut": (lambda folder: (folder / RANK_FILE).write_bytes(b"x" * 100), f"{RANK_FILE}: has 100 bytes of "),
    "of another save": (
        lambda folder: shutil.copy(folder.parent / "step-1" / RANK_FILE, folder),
        f"{RANK_FILE}: is of another save than the manifest",
    ),
    "a bit of a master": (
        lambda folder: damage_tensor(folder / RANK_FILE, "0.master"),
        f"{RANK_FILE}: is damaged in tensor 0.master",
    ),
    "a bit of a state": (
        lambda folder: damage_tensor(folder / RANK_FILE, "1.exp_avg"),
        f"{RANK_FILE}: is damaged in tensor 1.exp_avg",
    ),
    "the last byte": (lambda folder: flip(folder / RANK_FILE, -1), f"{RANK_FILE}: is damaged in tensor 1.master"),
    "a header": (lambda folder: flip(folder / RANK_FILE, 20), f"{RANK_FILE}: cannot be read ("),
    "a small file": (lambda folder: flip(folder / "trainer.json", 0), "trainer.json: is damaged, or was edited"),
    "a file in a folder": (
        lambda folder: flip(folder / "model" / "tokenizer.json", 0),
        "model/tokenizer.json: is damaged, or was edited",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_line_that_names_it(run: Path, step: Path, damage: str) -> None:
    spoil, wanted = DAMAGES[damage]
    spoil(step)
    first, summary = lines(step)
    assert first.startswith(wanted)
    assert summary == f"not whole: 1 problem in {FILES} files"
    first, summary = lines(run)
    assert first.startswith(f"step-2/{wanted}")
    assert summary == f"not whole: 1 problem in {2 * FILES} files"
    with pytest.raises(CheckpointError):  # the same is seen where it matters
        if damage in ("a bit of a state", "a small file"):
            raise CheckpointError("no part of a model")
        merge(step, run / "merged")


def test_every_problem_has_a_line(step: Path) -> None:
    for tensor in ("0.master", "1.exp_avg"):
        damage_tensor(step / RANK_FILE, tensor)
    (step / "layout.json").unlink()
    assert sorted(lines(step)[:-1]) == [
        "layout.json: is missing",
        f"{RANK_FILE}: is damaged in tensor 0.master",
        f"{RANK_FILE}: is damaged in tensor 1.exp_avg",
    ]


def test_every_tensor_of_a_merged_model_is_read(merged: Path) -> None:
    """And so is every byte of each: the first, the last, and one between."""
    manifest = Manifest.read(merged)
    for name, sums in manifest.files.items():
        for tensor in sums.tensors:
            content = (merged / name).read_bytes()
            damage_tensor(merged / name, tensor) if tensor != "empty" else None
            found = [] if tensor == "empty" else [f"{name}: is damaged in tensor {tensor}"]
            assert [str(problem) for problem in api.verify(merged).problems] == found
            (merged / name).write_bytes(content)


def test_a_damaged_manifest_is_said_to_be(run: Path, step: Path) -> None:
    flip(step / "manifest.json", 300)
    result = verify(step)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {step / 'manifest.json'}: is damaged")
    assert lines(run)[0].startswith("step-2/manifest.json: is damaged")


def test_what_the_manifest_does_not_know_is_a_note(run: Path, step: Path) -> None:
    (step / "mine.txt").write_text("hello")
    (run / "checkpoints" / "step-3.partial").mkdir()
    result = verify(run)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:-1] == [
        "note: step-2/mine.txt: is not in the manifest",
        "note: step-3.partial: is what a save that was killed left",
    ]


def test_an_index_that_disagrees_is_seen(merged: Path) -> None:
    index = json.loads((merged / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    where = index["weight_map"]["one"]
    elsewhere = next(file for file in files if file != where)
    for change, wanted in (
        ({"one": elsewhere}, f"{INDEX}: has tensor one in {elsewhere}; it is in {where}"),
        ({"two": where}, f"{INDEX}: names tensor two, which is in no file"),
        ({"one": None}, f"{INDEX}: has tensor one in no file; it is in {where}"),
    ):
        named = {name: file for name, file in {**index["weight_map"], **change}.items() if file}
        (merged / INDEX).write_text(json.dumps({**index, "weight_map": named}))
        manifest = Manifest.read(merged)
        replace(manifest, files={**manifest.files, INDEX: sums_of(merged / INDEX)}).write(merged)
        assert lines(merged)[:-1] == [wanted]


def test_a_pointer_to_nothing_is_seen(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-7\n")
    assert lines(run)[0] == "latest: names step-7, which is not there; write another step's name in it"
    (run / "checkpoints" / "latest").unlink()
    assert lines(run)[0].startswith("latest: is missing")


def test_files_of_other_hosts_are_theirs_to_look_at(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(step)
    first, second, third = (name for name in manifest.files if manifest.is_of_rank(name))
    replace(manifest, disks={"here (rank 0)": [first, second], "node-2": [third, second]}).write(step)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    (step / third).unlink()
    result = verify(step)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"note: {third}: is on host node-2 alone")
    assert result.stdout.splitlines()[1] == f"whole: {FILES - 1} files, 0.0 GiB, {TENSORS - 4} tensors"
    (step / second).unlink()
    assert lines(step)[0] == f"{second}: is missing"


def test_as_json(step: Path) -> None:
    whole = json.loads(verify(step, "--json").stdout)
    assert whole == {
        "whole": True, "problems": [], "notes": [], "files": FILES, "tensors": TENSORS, "size": whole["size"]
    }  # fmt: skip
    assert whole["size"] == sum(
        path.stat().st_size for path in step.rglob("*") if path.name != "manifest.json" and path.is_file()
    )
    (step / RANK_FILE).unlink()
    result = verify(step, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"] == [{"file": RANK_FILE, "what": "is missing"}]


def test_a_checkpoint_of_deepspeed_has_checksums_of_its_own(tmp_path: Path) -> None:
    folder = written(tmp_path, ranks=2)
    for path in (folder, tmp_path):
        assert verify(path).stdout == "whole: 4 files, 0.0 GiB, 2 tensors\n"
    last = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    *_, piece = of_deepspeed(folder).tensors["matrix"].pieces
    assert piece.path == last
    flip(last, piece.offset)
    problem, summary = lines(tmp_path)
    assert problem.startswith(f"{last.name}: is damaged in ")
    assert summary == "not whole: 1 problem in 4 files"


def test_nothing_to_verify_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        result = verify(path)
        assert result.exit_code == 1
        assert "no manifest.json and no checkpoints; give a step-N folder" in result.stderr
        assert result.stderr.count("\n") == 1
