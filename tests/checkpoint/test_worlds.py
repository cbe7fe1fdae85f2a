"""A checkpoint goes on with any number of ranks and either ZeRO stage: nothing is lost, and training is the same."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigtune import dist
from bigtune.checkpoint.blocks import quantize, whole_blocks
from bigtune.checkpoint.disks import find_disks
from bigtune.checkpoint.layout import MASTER, Layout, Range, Segment
from bigtune.checkpoint.save import Where, save
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.dist import World
from bigtune.errors import CheckpointError
from bigtune.model.load import read_config
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.optim import build_optimizer, code_books
from bigtune.train.state import collect, restore
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import Trained, metrics, step, train, train_on_rank

LONG, SAVED = 23, 3
WORLDS = [1, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4, 5, 8))]
"""Of each number of ranks, those after the first two take longer than `make test` has."""


def made(folder: Path, sizes: Mapping[str, int] = {}, **settings: Any) -> Trained:
    """A run of three steps on 2 ranks, whose partitions have odd borders; those of vectors have few elements."""
    tiny_model(folder / "model", tied=False, **sizes)
    write_rows(folder / "rows.jsonl")
    settings = {
        "train__steps": SAVED, "data__store": str(folder / "store"), "train__global_batch": 4,
        "optim__schedule": "constant", "optim__warmup_steps": 0, **settings,
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    train(run)
    return Trained(folder, settings, run)


ADAPTER = {"rank": 3, "alpha": 6.0}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"optim__name": "adamw"},
    "adamw_8bit": {"optim__name": "adamw_8bit"},
    "lora": {"optim__name": "adamw", "adapter": ADAPTER},
    "lora 8-bit": {"optim__name": "adamw_8bit", "adapter": ADAPTER},
    "zero2 lion_8bit": {"optim__name": "lion_8bit", "deepspeed": "zero2", "optim__learning_rate": 3e-4},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name == "lora 8-bit" else name for name in RUNS],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return made(tmp_path_factory.mktemp("worlds"), **RUNS[request.param])


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return made(tmp_path_factory.mktemp("adamw"), **RUNS["adamw"])


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    sizes = {"hidden_size": 96, "intermediate_size": 190}  # of the first layer, attention is whole blocks on 2, 3 ranks
    return made(tmp_path_factory.mktemp("eight"), sizes, **RUNS["adamw_8bit"])


def convert_on_rank(run: Run, start: Path, sub_group_size: int | None) -> str:
    """Restore a checkpoint on as many ranks as there are, and save it again as it is then."""
    world, group = World.from_environment(), dist.own_group()
    preset = read_preset(run.deepspeed)
    if sub_group_size:
        preset["zero_optimization"]["sub_group_size"] = sub_group_size
    config = complete(preset, run, "float32", read_config(run.model.path).hidden_size)
    engine = Engine(run.model.path, run.optim, config, "float32", world, adapter=run.adapter)
    disks = find_disks(run.output / "checkpoints", world, group)
    try:
        restore(engine, start, disks, group)
    except CheckpointError as error:
        return str(error)
    layout, tensors = collect(engine)
    save(Where(run.output / "checkpoints", world, disks, group=group), SAVED, layout, tensors, {}, {})
    return ""


def convert(
    trained: Trained, start: Path, output: Path, ranks: int, sub_group_size: int | None = None, **changes: Any
) -> Path:
    run = trained.another(output, **changes)
    assert run_distributed(convert_on_rank, ranks, run, start, sub_group_size) == [""] * ranks
    return step(run, SAVED)


def books(run: Run) -> dict[str, torch.Tensor]:
    return code_books(build_optimizer([{"params": [torch.zeros(1)], "optim_bits": 8}], run.optim))


def states(folder: Path, run: Run) -> dict[str, torch.Tensor]:
    """The values of each parameter's kinds, whole and dequantized, and the scale of each element of 8-bit ones, put
    together here from the layout's numbers."""
    layout = Layout.read(folder)
    files = [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]
    assert len(files) == layout.world_size
    found = {}
    for group in layout.sub_groups:
        flats = {MASTER: [content[f"{group.index}.{MASTER}"] for content in files]}
        for kind, state in group.states.items():
            if state.scales is not None:
                of_block = torch.arange(group.numel) // 256
                scales = [content[f"{group.index}.{state.scales}"][of_block] for content in files]
                codes = [content[f"{group.index}.{kind}"] for content in files]
                flats[f"{kind}:scale"] = scales
                flats[kind] = [books(run)[kind][code.long()] * scale for code, scale in zip(codes, scales, strict=True)]
            elif state.block == 1:
                flats[kind] = [content[f"{group.index}.{kind}"] for content in files]
        for kind, parts in flats.items():
            for parameter in group.parameters:
                windows = torch.cat([flat[parameter.offset : parameter.offset + parameter.length] for flat in parts])
                found[f"{parameter.name} {kind}"] = windows[parameter.first : parameter.first + parameter.numel]
    return found


def assert_same_states(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], run: Run) -> None:
    """32-bit values to the last bit; 8-bit ones within one step of the code book times the scale of their new block."""
    assert before.keys() == after.keys()
    for name, value in before.items():
        if f"{name}:scale" in before:
            book = torch.sort(books(run)[name.split(" ")[1]])[0]
            step = (book[1:] - book[:-1]).max() * after[f"{name}:scale"]
            assert bool(((value - after[name]).abs() <= step).all()), name
        elif not name.endswith(":scale"):
            assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("ranks", [1, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_nothing_is_lost_on_another_number_of_ranks(trained: Trained, tmp_path: Path, ranks: int) -> None:
    before = states(step(trained.run, SAVED), trained.run)
    after = states(convert(trained, step(trained.run, SAVED), tmp_path, ranks), trained.run)
    assert all(value.abs().max() > 0 for name, value in before.items() if name.endswith(MASTER))
    assert_same_states(before, after, trained.run)
    eight = {name for name in before if name.endswith(":scale")}
    assert bool(eight) is trained.run.optim.name.endswith("_8bit")
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in eight)


@pytest.mark.parametrize("sub_group_size", [700, None])
@pytest.mark.parametrize("between", [1, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_32_bit_states_come_back_to_the_last_bit(
    adamw: Trained, tmp_path: Path, between: int, sub_group_size: int | None
) -> None:
    """2 ranks, others, 2 again: with sub-groups whose borders move, too."""
    there = convert(adamw, step(adamw.run, SAVED), tmp_path / "there", between, sub_group_size)
    back = convert(adamw, there, tmp_path / "back", 2)
    for rank in range(2):
        name = f"rank-{rank:05d}-of-00002.safetensors"
        first, second = load_file(step(adamw.run, SAVED) / name), load_file(back / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_8_bit_blocks_that_stay_aligned_keep_their_bits(eight: Trained, tmp_path: Path) -> None:
    """2 ranks to 3 and back. A block that is a saved one keeps codes and scale; how many do is counted, so that neither
    kind is missing; the way back is within one step again."""
    there = convert(eight, step(eight.run, SAVED), tmp_path / "there", 3)
    back = convert(eight, there, tmp_path / "back", 2)
    kept, mixed = 0, 0
    for source, target in ((step(eight.run, SAVED), there), (there, back)):
        saved, live = Layout.read(source), Layout.read(target)
        assert min(part.numel for part in live.sub_groups) < 4096
        for rank in range(live.world_size):
            for part in live.sub_groups:
                for kind, state in part.states.items():
                    if state.scales is not None:
                        blocks = whole_blocks(list(live.segments(part, rank, saved)), part.numel, 256)
                        kept += assert_kept(
                            blocks, kind, state.scales, part.index, rank, (source, saved), (target, live)
                        )
                        mixed += int((blocks == -2).sum())
    assert kept > 20
    assert mixed > 20
    assert_same_states(states(there, eight.run), states(back, eight.run), eight.run)


def assert_kept(blocks: Any, kind: str, scales: str, index: int, rank: int, source: Any, target: Any) -> int:
    kept = 0
    contents = [load_file(path) for path in sorted(source[0].glob("rank-*.safetensors"))]
    mine = load_file(sorted(target[0].glob("rank-*.safetensors"))[rank])
    for block, number in enumerate(blocks.tolist()):
        if number < 0:
            continue
        there, sub_group, saved = number >> 50, number >> 38 & 0xFFF, number & (1 << 38) - 1
        codes, was = (
            mine[f"{index}.{kind}"][block * 256 :][:256],
            contents[there][f"{sub_group}.{kind}"][saved * 256 :][:256],
        )
        length = min(len(codes), len(was))
        assert torch.equal(codes[:length], was[:length])
        assert mine[f"{index}.{scales}"][block] == contents[there][f"{sub_group}.{scales}"][saved]
        kept += 1
    return kept


def test_quantizing_an_aligned_block_anew_would_be_seen(eight: Trained) -> None:
    """The mutation: the codes of a saved block, dequantized and quantized again, are others."""
    content = load_file(step(eight.run, SAVED) / "rank-00000-of-00002.safetensors")
    book = books(eight.run)["state1"]
    codes, scales = content["0.state1"], content["0.absmax1"]
    values = book[codes.long()] * scales[torch.arange(len(codes)) // 256]
    again, _ = quantize(values, book, 256)
    assert not torch.equal(again, codes)


def test_blocks_are_told_apart_by_where_their_elements_lie() -> None:
    def segment(offset: int, rank: int, source: int, count: int) -> Segment:
        return Segment(offset, Range(rank, 1, source, 0, count))

    # Block 0: its own. 1: from two ranks. 2: moved by one element. 3: padding.
    segments = [segment(0, 3, 512, 300), segment(300, 4, 300, 200), segment(512, 3, 1025, 256)]
    blocks = whole_blocks(segments, 1024, 256).tolist()
    assert blocks == [(3 << 50) + (1 << 38) + 2, -2, -2, -1]
    whole = whole_blocks([segment(0, 3, 512, 256), segment(256, 3, 768, 9)], 300, 256).tolist()
    assert whole == [(3 << 50) + (1 << 38) + 2, (3 << 50) + (1 << 38) + 3]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.mark.parametrize("ranks", WORLDS)
def test_training_goes_on_the_same_on_any_number_of_ranks(trained: Trained, tmp_path: Path, ranks: int) -> None:
    """20 steps more: in float32 within 1e-5 of what 2 ranks compute, over the same rows in the same order."""
    wanted = reference(trained)
    run = trained.another(tmp_path / "run", train__steps=LONG)
    train(run, ranks=ranks, resume=str(step(trained.run, SAVED)))
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(SAVED + 1, LONG + 1))
    tolerance = 1e-5 if trained.run.optim.name == "adamw" else 1e-3
    for line, other in zip(lines, wanted, strict=True):
        assert math.isclose(line["loss"], other["loss"], rel_tol=tolerance), line["step"]
        for key in ("tokens", "supervised_tokens", "epoch", "learning_rate"):
            assert line[key] == other[key]


_references: dict[Path, list[dict[str, Any]]] = {}


def reference(trained: Trained) -> list[dict[str, Any]]:
    """The same 20 steps on the ranks that saved, once for each run."""
    if trained.folder not in _references:
        run = trained.another(trained.folder / "long", train__steps=LONG)
        train(run)
        _references[trained.folder] = metrics(run)[SAVED:]
    return _references[trained.folder]


def test_a_state_that_is_left_out_would_be_seen(adamw: Trained, tmp_path: Path) -> None:
    """The mutation: without its moments a run on 3 ranks computes other losses."""
    wanted = reference(adamw)
    run = adamw.another(tmp_path / "run", train__steps=LONG)
    patches = {"bigtune.train.state.import_state": _forget}
    train(run, ranks=3, resume=str(step(adamw.run, SAVED)), patches=patches)
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(metrics(run), wanted, strict=True)) > 1e-3


def _forget(*_: Any) -> None:
    """In place of giving a partition its state."""


@pytest.mark.parametrize(("saved", "live"), [("zero3", "zero2"), ("zero2", "zero3"), ("zero3", "zero3_offload")])
def test_presets_read_each_others_checkpoints(tmp_path: Path, saved: str, live: str) -> None:
    trained = made(tmp_path, optim__name="adamw", deepspeed=saved)
    run = trained.another(tmp_path / "other", train__steps=SAVED + 3, deepspeed=live)
    train(run, ranks=3, resume=str(step(trained.run, SAVED)))
    same = trained.another(tmp_path / "run", train__steps=SAVED + 3)
    train(same)
    assert torch.allclose(torch.tensor(losses(run)), torch.tensor(losses(same)[SAVED:]), rtol=1e-5)


def test_a_checkpoint_of_another_model_is_told(adamw: Trained, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", tied=False, num_hidden_layers=1)
    run = adamw.another(tmp_path / "run", model={"path": str(tmp_path / "model")})
    said = run_distributed(convert_on_rank, 2, run, step(adamw.run, SAVED), None)
    assert said[0] == said[1]
    assert "holds other parameters than this run trains; 9 differ, among them model.layers.1." in said[0]
    (message, *_) = run_distributed(train_on_rank, 2, run, None, str(step(adamw.run, SAVED)))
    assert "the saved state is another model's" in message
