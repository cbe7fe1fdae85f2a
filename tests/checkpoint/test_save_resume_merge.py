"""A run that stopped goes on to the last bit, and its model is what was trained, whatever went wrong between."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigtune.checkpoint.layout import Layout
from bigtune.checkpoint.merge import merge
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.runfile import load_run
from bigtune.train.start import find_start
from tests.disk import resize, small_disk
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import RANKS, Trained, differing, metrics, reseal, save_rank_file, train, train_on_rank
from tests.training import step as step_of

STEPS, STOP_AFTER = 7, 3


RUNS = (
    "adamw tied float32 zero3",
    "adamw_8bit untied float32 zero3",
    "adamw_8bit tied bfloat16 zero3",
    "adamw tied bfloat16 zero3_offload",
    "lion_8bit tied bfloat16 zero2",
)


@pytest.fixture(scope="module", params=RUNS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), *request.param.split())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Where neither the optimizer nor the model matters."""
    return make_trained(tmp_path_factory.mktemp("plain"), "adamw", "tied", "float32", "zero3")


def make_trained(folder: Path, optimizer: str, tied: str, precision: str, preset: str) -> Trained:
    tiny_model(folder / "model", tied=tied == "tied", dtype=precision)
    write_rows(folder / "rows.jsonl")
    settings = {
        "optim__name": optimizer, "train__precision": precision, "train__steps": STEPS,
        "checkpoint__every_steps": STOP_AFTER, "data__store": str(folder / "store"), "train__global_batch": 3,
        "deepspeed": preset,
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    train(run)
    return Trained(folder, settings, run)


def step(run: Run, number: int = STEPS) -> Path:
    return step_of(run, number)


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(trained: Trained, tmp_path: Path) -> None:
    run = trained.another(tmp_path / "stopped", checkpoint__every_steps=None)
    train(run, stop_after=STOP_AFTER)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert differing(step(run, STOP_AFTER), step(trained.run, STOP_AFTER)) == []
    train(run)
    assert metrics(run) == metrics(trained.run)
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert differing(step(run), step(trained.run)) == []
    assert differing(step(run), step(run, STOP_AFTER)) != []  # the comparison sees training
    for name in ("trainer.json", "data.json", "layout.json"):
        assert (step(run) / name).read_text() == (step(trained.run) / name).read_text()


def test_training_learns_and_crosses_an_epoch(trained: Trained) -> None:
    """So that the equality above is about something."""
    lines = metrics(trained.run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["epoch"] > 1 > lines[STOP_AFTER - 1]["epoch"]
    assert all(line["grad_norm"] > 0 and not line["skipped"] for line in lines)


def test_going_back_to_an_earlier_step_computes_the_same_again(trained: Trained, tmp_path: Path) -> None:
    """`--resume step-3` drops the later lines and replaces the later checkpoints."""
    shutil.copytree(trained.run.output, tmp_path / "run")
    run = trained.another(tmp_path / "run")
    (step(run) / "README").touch()
    train(run, stop_after=None, resume=f"step-{STOP_AFTER}")
    assert metrics(run) == metrics(trained.run)
    assert differing(step(run), step(trained.run)) == []
    assert not (step(run) / "README").exists()  # the checkpoint was replaced as a whole


def test_who_goes_back_stays_there(plain: Trained, tmp_path: Path) -> None:
    """Neither a stop before the next save nor pruning brings the abandoned steps back."""
    shutil.copytree(plain.run.output, tmp_path / "run")
    run = plain.another(tmp_path / "run", checkpoint__every_steps=1, checkpoint__keep_last=1)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert latest.read_text() == f"step-{STEPS}\n"
    train(run, stop_after=0, resume=f"step-{STOP_AFTER}")
    assert latest.read_text() == f"step-{STOP_AFTER}\n"
    train(run, stop_after=1, resume=f"step-{STOP_AFTER}")
    assert latest.read_text() == f"step-{STOP_AFTER + 1}\n"
    assert step(run, STOP_AFTER + 1).is_dir()
    assert not step(run, STOP_AFTER).exists()
    train(run)
    assert metrics(run) == metrics(plain.run)
    assert differing(step(run), step(plain.run)) == []


@pytest.mark.parametrize("kind", ["moment", "master"])
def test_one_changed_value_in_the_saved_file_would_be_seen(trained: Trained, tmp_path: Path, kind: str) -> None:
    """The mutation: otherwise the equality might hold because states do not matter."""
    shutil.copytree(trained.run.output, tmp_path / "run")
    run = trained.another(tmp_path / "run")
    layout = Layout.read(step(run, STOP_AFTER))
    moment = "exp_avg" if run.optim.name == "adamw" else "state1"
    path = step(run, STOP_AFTER) / "rank-00000-of-00002.safetensors"
    content = load_file(path)
    assert layout.sub_groups[0].group == "matrices"
    changed = content[f"0.{moment if kind == 'moment' else 'master'}"]
    if changed.dtype == torch.uint8:
        changed[0] ^= 64
    else:
        changed[0] += 1e-2
    save_rank_file(content, path)
    reseal(path.parent)
    train(run, stop_after=None, resume=f"step-{STOP_AFTER}")
    assert differing(step(run), step(trained.run)) != []


def test_other_documents_are_refused(plain: Trained, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=41)
    run = plain.another(tmp_path / "other", data__store=str(tmp_path / "store"), train__steps=STEPS + 1)
    other = tiny_run(plain.folder, data__sources=[{"path": str(rows)}])
    prepare(other.data, run.model.path, run.store)
    messages = run_distributed(train_on_rank, RANKS, run, None, str(step(plain.run)))
    assert all("was trained on other rows" in message for message in messages)


def test_a_run_that_is_done_changes_nothing(plain: Trained) -> None:
    before = {path: path.stat().st_mtime_ns for path in (plain.run.output / "checkpoints").rglob("*")}
    lines = metrics(plain.run)
    train(plain.run)
    assert {path: path.stat().st_mtime_ns for path in (plain.run.output / "checkpoints").rglob("*")} == before
    assert metrics(plain.run) == lines


def test_only_the_last_checkpoints_are_kept_where_asked(plain: Trained, tmp_path: Path) -> None:
    run = plain.another(tmp_path / "pruned", checkpoint__every_steps=1, checkpoint__keep_last=2, train__steps=4)
    train(run)
    assert sorted(path.name for path in (run.output / "checkpoints").iterdir()) == ["latest", "step-3", "step-4"]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_8_bit_states_are_the_matrices_alone_on_any_number_of_ranks(
    trained: Trained, tmp_path: Path, ranks: int
) -> None:
    run = trained.another(tmp_path / "run", train__steps=1, optim__warmup_steps=0)
    train(run, ranks=ranks)
    layout = Layout.read(step(run, 1))
    assert {group.group for group in layout.sub_groups} == {"matrices", "embeddings", "vectors"}
    kinds = {"adamw": ("exp_avg", "exp_avg_sq"), "adamw_8bit": ("state1", "state2"), "lion_8bit": ("state1",)}[
        run.optim.name
    ]
    for group in layout.sub_groups:
        eight = run.optim.name.endswith("_8bit") and group.group == "matrices"
        for rank in range(ranks):
            content = load_file(step(run, 1) / f"rank-{rank:05d}-of-{ranks:05d}.safetensors")
            assert content[f"{group.index}.master"].dtype == torch.float32
            for kind in kinds:
                assert content[f"{group.index}.{kind}"].dtype == (torch.uint8 if eight else torch.float32)
                assert len(content[f"{group.index}.{kind}"]) == group.numel
                assert group.states[kind].dtype == ("uint8" if eight else "float32")
            if eight:
                assert group.states["absmax1"].block == 256
                assert len(content[f"{group.index}.absmax1"]) == -(-group.numel // 256)


# ---------------------------------------------------------------------------------------------- a bad file


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty"])
def test_a_damaged_rank_file_is_one_line(plain: Trained, tmp_path: Path, damage: str) -> None:
    checkpoint = shutil.copytree(step(plain.run), tmp_path / "step-7")
    path = checkpoint / "rank-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[:-100], "garbage": b"x" * 100, "empty": b""}[damage])
    run = plain.another(tmp_path / "resumed", train__steps=STEPS + 1)
    messages = run_distributed(train_on_rank, RANKS, run, None, str(checkpoint))
    assert all(message.startswith("CheckpointError: ") and "rank-00001" in message for message in messages)


# -------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The checkpoints folder of `tmp_path / "run"`, on a file system of its own."""
    with small_disk(tmp_path / "run" / "checkpoints") as folder:
        yield folder


@pytest.mark.parametrize("room", [0.25, 0.6, 0.97], ids=["first file", "second file", "last bytes"])
def test_a_full_disk_costs_the_new_checkpoint_only(plain: Trained, disk: Path, room: float, tmp_path: Path) -> None:
    """There is room for one checkpoint and a part of the second."""
    run = plain.another(disk.parent, checkpoint__every_steps=STOP_AFTER)
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in step(plain.run).rglob("*") if path.is_file())
    resize(disk, int((1 + room) * size))
    messages = run_distributed(train_on_rank, RANKS, run)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"CheckpointError: {disk / 'step-6'}: could not be saved (rank ")
    assert "the checkpoint before stays the latest; make room and start again" in messages[0]
    assert "\n" not in messages[0]
    assert sorted(path.name for path in disk.iterdir()) == ["latest", "step-3"]
    assert (disk / "latest").read_text() == "step-3\n"
    merge(run.output, tmp_path / "merged")
    resize(disk, "64m")
    train(run)
    assert metrics(run) == metrics(plain.run)
    assert differing(step(run), step(plain.run)) == []


def test_a_checkpoint_of_a_killed_save_is_no_checkpoint(plain: Trained, tmp_path: Path) -> None:
    """A kill leaves step-N.partial: never resumed, and gone after the next save of that step."""
    shutil.copytree(plain.run.output, tmp_path / "run")
    run = plain.another(tmp_path / "run", train__steps=STEPS + 1)
    partial = step(run).with_name(f"step-{STEPS + 1}.partial")
    shutil.copytree(step(run), partial)
    assert find_start(run, None) == step(run)
    train(run)
    assert not partial.exists()
    assert find_start(run, None) == step(run, STEPS + 1)


def test_the_checkpoint_holds_the_run_that_made_it(plain: Trained) -> None:
    assert load_run(step(plain.run) / "run.yaml") == plain.run
    versions = json.loads((step(plain.run) / "trainer.json").read_text())["versions"]
    assert set(versions) == {"bigtune", "torch", "deepspeed", "transformers"}
