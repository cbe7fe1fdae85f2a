"""The merged model is what was trained, to the last bit, however it is cut into files, blocks and threads."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bigtune.checkpoint import stream
from bigtune.checkpoint.manifest import Manifest
from bigtune.checkpoint.merge import merge, parse_size
from bigtune.checkpoint.verify import verify
from bigtune.data.prepare import prepare
from bigtune.errors import CheckpointError
from bigtune.model.shards import Shards
from bigtune.tensorfile import sums_of
from tests.checkpoint.made import (
    content_of,
    damage_tensor,
    flip,
    make_checkpoint,
    some_tensors,
    values,
)
from tests.checkpoint.test_deepspeed import CASES, as_deepspeed_reads, save_with_deepspeed
from tests.disk import small_disk
from tests.distributed import run_distributed
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import Trained, step, train

STEPS, EARLIER = 4, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNS = (
    "adamw tied float32 zero3",
    "adamw_8bit untied bfloat16 zero3",
    "lion_8bit tied bfloat16 zero2",
)


@pytest.fixture(scope="module", params=RUNS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), *request.param.split())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Where neither the optimizer nor the model matters."""
    return make_trained(tmp_path_factory.mktemp("plain"), *RUNS[0].split())


def make_trained(folder: Path, optimizer: str, tied: str, precision: str, preset: str) -> Trained:
    tiny_model(folder / "model", tied=tied == "tied", dtype=precision)
    write_rows(folder / "rows.jsonl")
    settings = {
        "optim__name": optimizer, "train__precision": precision, "train__steps": STEPS, "train__global_batch": 3,
        "checkpoint__every_steps": EARLIER, "data__store": str(folder / "store"), "deepspeed": preset,
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, run.model.path, run.store)
    train(run)
    return Trained(folder, settings, run)


def whole_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 values of a checkpoint, put together by hand from its files."""
    layout = json.loads((folder / "layout.json").read_text())
    ranks = [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]
    whole = {}
    for group in layout["sub_groups"]:
        for entry in group["parameters"]:
            start, end = entry["offset"], entry["offset"] + entry["length"]
            flat = torch.cat([content[f"{group['index']}.master"][start:end] for content in ranks])
            first, numel = entry["first"], torch.Size(entry["shape"]).numel()
            whole[entry["name"]] = flat[first : first + numel].view(entry["shape"])
    return whole


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of a merged model."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        read = load_file(path)
        assert not tensors.keys() & read.keys()
        tensors |= read
    return tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the last bit; but of what is not a number, that both are none: which one it is even torch's cast does not say,
    whose vectors give another than its single elements."""
    numbers = ~one.isnan()
    return (
        (one.dtype, one.shape) == (other.dtype, other.shape)
        and torch.equal(numbers, ~other.isnan())
        and torch.equal(one[numbers].view(torch.uint8), other[numbers].view(torch.uint8))
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """So few elements in a block that small tensors have many."""
    monkeypatch.setattr(stream, "BLOCK", 50)
    return 50


# --------------------------------------------------------------------------------------------- of a real run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("shard_bytes", [30_000, 10**9])
def test_the_merged_model_is_what_was_trained(
    trained: Trained, tmp_path: Path, dtype: str | None, shard_bytes: int
) -> None:
    output = merge(trained.run.output, tmp_path / "merged", dtype, shard_bytes)
    wanted_dtype = DTYPES[dtype or trained.run.train.precision]  # the base model was saved in it
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == wanted_dtype
    wanted = whole_parameters(step(trained.run, STEPS))
    base = dict(AutoModelForCausalLM.from_pretrained(trained.run.model.path).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys() == base.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(wanted_dtype)), name
    assert not torch.equal(found["model.norm.weight"], base["model.norm.weight"].to(wanted_dtype))
    tied = "lm_head.weight" not in wanted
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    files = sorted(path.name for path in output.glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        assert not (output / "model.safetensors.index.json").exists()
    else:
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert len(files) > 2
        assert sorted(set(index["weight_map"].values())) == files
        assert index["weight_map"].keys() == wanted.keys()
        for file in files:  # a larger tensor has a file of its own
            assert (output / file).stat().st_size < 40_000 or len(load_file(output / file)) == 1
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]  # nothing is left aside


def test_a_step_a_run_and_a_checkpoints_folder_may_be_merged(plain: Trained, tmp_path: Path) -> None:
    newest, earlier = step(plain.run, STEPS), step(plain.run, EARLIER)
    merged = [
        loaded(merge(path, tmp_path / str(number)))["model.norm.weight"]
        for number, path in enumerate((newest, plain.run.output, newest.parent, earlier))
    ]
    assert torch.equal(merged[1], merged[0])
    assert torch.equal(merged[2], merged[0])
    assert not torch.equal(merged[3], merged[0])


def test_the_template_that_was_learnt_goes_with_the_model(plain: Trained, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    merged = AutoTokenizer.from_pretrained(merge(plain.run.output, tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(plain.run.model.path).chat_template is None
    text = merged.apply_chat_template([{"role": "user", "content": "Say red."}], tokenize=False)
    assert "### Instruction:\nSay red." in text


# --------------------------------------------------------------------------------------------- of chosen values


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.usefixtures("small_blocks")
def test_every_element_comes_to_its_place(tmp_path: Path, stage: int, ranks: int) -> None:
    tensors = some_tensors()
    merged = loaded(merge(make_checkpoint(tmp_path / "step-1", tensors, ranks, stage), tmp_path / "merged"))
    assert merged.keys() == tensors.keys()
    assert all(same(merged[name], torch.from_numpy(tensor)) for name, tensor in tensors.items())


def test_one_element_in_another_place_would_be_seen(tmp_path: Path) -> None:
    """The mutation."""
    tensors = some_tensors()
    merged = loaded(merge(make_checkpoint(tmp_path / "step-1", tensors), tmp_path / "merged"))["embed.weight"]
    merged[0, 0], merged[0, 1] = float(merged[0, 1]), float(merged[0, 0])
    assert not same(merged, torch.from_numpy(tensors["embed.weight"]))


def hard_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Ties, subnormals, values over what fits, infinities and NaN, and random bits."""
    chosen = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, -65520.0, 1e30, 3.4e38, -3.4e38, 3.3895e38, 1e-40, 6e-8]
    chosen += [2.9e-8, 2.98e-8, 6.1e-5, 1.00390625, 1.01171875, 1.00048828125, np.inf, -np.inf, np.nan]
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = bits & 0xFFFF0000 | 0x8000  # half between two of bfloat16
    return np.concatenate([np.array(chosen, np.float32), bits.view(np.float32), ties.view(np.float32)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("error")
def test_values_are_rounded_as_torch_rounds_them(tmp_path: Path, dtype: str) -> None:
    tensor = hard_values()
    output = merge(make_checkpoint(tmp_path / "step-1", {"hard": tensor}), tmp_path / "merged", dtype)
    merged, wanted = loaded(output)["hard"], torch.from_numpy(tensor)
    assert same(merged, wanted.to(DTYPES[dtype]))
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    if dtype != "float32":  # the mutation: one that cuts bits off
        cut = (wanted.view(torch.int32) & ~0xFFFF).view(torch.float32).to(DTYPES[dtype])
        assert not same(merged, cut)


def test_a_tensor_larger_than_a_block_and_than_a_file(tmp_path: Path) -> None:
    tensors = {"a": values((3, 5), 1), "large": values((1100, 1001), 2), "z": values((2, 2), 3)}
    assert tensors["large"].size > stream.BLOCK
    output = merge(make_checkpoint(tmp_path / "step-1", tensors), tmp_path / "merged", shard_bytes=10**6)
    assert all(same(loaded(output)[name], torch.from_numpy(tensor)) for name, tensor in tensors.items())
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["weight_map"] == dict(zip(tensors, names, strict=True))
    assert index["metadata"] == {"total_size": 4 * (15 + 1100 * 1001 + 4)}


@pytest.mark.parametrize("shard_bytes", [1000, 10**9])
@pytest.mark.usefixtures("small_blocks")
def test_threads_make_no_difference(tmp_path: Path, shard_bytes: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "step-1", some_tensors())
    one, three, other = (
        content_of(merge(checkpoint, tmp_path / name, dtype, shard_bytes, workers=workers))
        for name, dtype, workers in (("one", "bfloat16", 1), ("three", "bfloat16", 3), ("other", "float16", 3))
    )
    assert one == three
    assert one != other  # the comparison sees values
    assert one.keys() == other.keys()


def test_a_model_has_a_manifest_that_tells_what_is_in_it(tmp_path: Path) -> None:
    output = merge(make_checkpoint(tmp_path / "step-1", some_tensors()), tmp_path / "merged", shard_bytes=1000)
    manifest = Manifest.read(output)
    assert {*manifest.files, "manifest.json"} == content_of(output).keys()
    assert all(sums == sums_of(output / name) for name, sums in manifest.files.items())
    assert verify(output).whole


def test_experts_are_in_the_files_as_they_were(tmp_path: Path) -> None:
    joined = {"layer.1.weight": {"up.0": (2, 7, 3), "up.1": (1, 7, 3), "up.2": (2, 7, 3)}}
    tensors = some_tensors()
    output = merge(make_checkpoint(tmp_path / "step-1", tensors, joined=joined), tmp_path / "merged", shard_bytes=100)
    merged = loaded(output)
    assert merged.keys() == tensors.keys() - joined.keys() | joined["layer.1.weight"].keys()
    whole = torch.cat([merged[name] for name in joined["layer.1.weight"]])
    assert same(whole, torch.from_numpy(tensors["layer.1.weight"]))


def test_no_code_of_a_checkpoint_runs_and_its_config_goes_along(tmp_path: Path) -> None:
    output = merge(make_checkpoint(tmp_path / "step-1", some_tensors()), tmp_path / "merged")
    assert json.loads((output / "config.json").read_text())["auto_map"] == {"AutoConfig": "evil.Config"}
    assert (output / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"


def test_an_old_name_of_the_dtype_is_kept_right(tmp_path: Path) -> None:
    small = {"config.json": json.dumps({"torch_dtype": "bfloat16"})}
    output = merge(make_checkpoint(tmp_path / "step-1", some_tensors(), small=small), tmp_path / "merged")
    assert {tensor.dtype for tensor in loaded(output).values()} == {torch.bfloat16}
    other = merge(tmp_path / "step-1", tmp_path / "other", "float16")
    assert json.loads((other / "config.json").read_text()) == {"torch_dtype": "float16", "dtype": "float16"}


# ----------------------------------------------------------------------------------------- DeepSpeed's own


@pytest.mark.parametrize("name", ["2 ranks, bfloat16", "3 ranks, bfloat16, sub-groups"])
def test_a_checkpoint_of_deepspeed_becomes_what_its_own_script_makes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tiny_model(tmp_path / "model", tied=case.tied)
    run_distributed(save_with_deepspeed, case.ranks, tmp_path / "model", tmp_path / "saved", case)
    theirs = as_deepspeed_reads(tmp_path / "saved")
    said = list[str]()
    alone = merge(tmp_path / "saved", tmp_path / "alone", "float32", 50_000, say=said.append)
    assert said == [f"{tmp_path / 'saved' / 'global_step2'}: has no config.json: the weights are merged alone; "
                    "--base FOLDER gives one"]  # fmt: skip
    again = {"lm_head.weight"} if case.tied else set()
    ours = loaded(alone)
    assert ours.keys() == theirs.keys() - again
    half = merge(tmp_path / "saved", tmp_path / "half", "bfloat16", base=tmp_path / "model")
    for merged, dtype in ((ours, torch.float32), (loaded(half), torch.bfloat16)):
        for name, tensor in merged.items():
            kept = name in ("scales", "counts")  # buffers go along as they are; what is frozen is kept in bfloat16
            assert same(tensor, theirs[name] if kept else theirs[name].to(dtype)), name
    assert not same(ours["model.norm.weight"] + 1e-7, theirs["model.norm.weight"])  # the mutation
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= content_of(half).keys()
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    assert verify(alone).whole and verify(half).whole


# --------------------------------------------------------------------------------------------------- adapters

RANK, SCALE = 3, 0.7


def adapted(folder: Path, base: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A LoRA checkpoint over a base model: one layer in a piece, one in two, one transposed; what is wanted of them."""
    (folder / "base").mkdir(parents=True)
    save_file({name: torch.from_numpy(value) for name, value in base.items()}, folder / "base" / "model.safetensors")
    pairs = {"plain": (31, 12), "joined": (9, 7), "turned": (8, 20)}
    shapes = {f"{name}.weight": shape for name, shape in pairs.items()} | {"frozen.weight": (5, 5)}
    tensors, folds, wanted = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    weights = {**base, "joined.weight": np.concatenate([base["joined.q"], base["joined.k"]])}
    for seed, (name, (rows, columns)) in enumerate(pairs.items()):
        outputs, inputs = (columns, rows) if name == "turned" else (rows, columns)
        a, b = values((RANK, inputs), seed), values((outputs, RANK), 10 + seed)
        names = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        tensors |= dict(zip(names, (a, b), strict=True))
        folds[f"{name}.weight"] = {
            "lora_a": names[0], "lora_b": names[1], "scale": SCALE, "transposed": name == "turned"
        }  # fmt: skip
        change = (b.astype(np.float64) @ a) * SCALE
        wanted[f"{name}.weight"] = weights[f"{name}.weight"] + (change.T if name == "turned" else change)
    wanted |= {"joined.q": wanted["joined.weight"][:4], "joined.k": wanted.pop("joined.weight")[4:]}
    about = {
        "path": str(folder / "base"), "fingerprint": Shards(folder / "base").fingerprint(), "folds": folds,
        "frozen": shapes, "config": {"peft_type": "LORA"},
    }  # fmt: skip
    joined = {"joined.weight": {"joined.q": (4, 7), "joined.k": (5, 7)}}
    checkpoint = make_checkpoint(folder / "step-1", tensors, joined=joined, extra={"adapter.json": json.dumps(about)})
    return checkpoint, {**wanted, "frozen.weight": base["frozen.weight"]}


def base_values(kind: Any = np.float32) -> dict[str, Any]:
    shapes = {"plain.weight": (31, 12), "joined.q": (4, 7), "joined.k": (5, 7), "turned.weight": (8, 20)}
    shapes |= {"frozen.weight": (5, 5)}
    return {name: values(shape, 20 + seed).astype(kind) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
@pytest.mark.usefixtures("small_blocks")
def test_adapters_are_folded_in_block_by_block(tmp_path: Path, kind: Any) -> None:
    base = base_values(kind)
    checkpoint, wanted = adapted(tmp_path, base)
    one = merge(checkpoint, tmp_path / "merged", "float32", shard_bytes=500, workers=1)
    assert content_of(one) == content_of(merge(checkpoint, tmp_path / "again", "float32", shard_bytes=500, workers=3))
    merged = loaded(one)
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.allclose(merged[name], value, atol=1e-5, rtol=0), name
        if name != "frozen.weight":  # the mutations: not folded, or of the next row
            assert not np.allclose(merged[name], base[name], atol=1e-2)
            assert not np.allclose(merged[name], np.roll(value - base[name], 1, axis=0) + base[name], atol=1e-2)
    assert same(merged["frozen.weight"], torch.from_numpy(base["frozen.weight"]).float())


def test_an_adapter_alone_is_one_file_without_a_config(tmp_path: Path) -> None:
    checkpoint, _ = adapted(tmp_path, base_values())
    output = merge(checkpoint, tmp_path / "merged", adapter=True, shard_bytes=10)
    files = content_of(output)
    assert "config.json" not in files
    assert [name for name in files if name.endswith(".safetensors")] == ["adapter_model.safetensors"]
    assert json.loads(files["adapter_config.json"]) == {
        "peft_type": "LORA",
        "base_model_name_or_path": str(tmp_path / "base"),
    }
    assert same(loaded(output)["base_model.model.plain.lora_A.weight"], torch.from_numpy(values((RANK, 12), 0)))
    assert verify(output).whole


# ------------------------------------------------------------------------------------------- what goes wrong


def refused(checkpoint: Path, output: Path, **options: Any) -> str:
    before = content_of(output.parent) if output.parent.is_dir() else {}
    with pytest.raises(CheckpointError) as caught:
        merge(checkpoint, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.with_name(output.name + ".partial").exists()
    assert not output.parent.is_dir() or content_of(output.parent) == before
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "run" / "step-1", some_tensors())


def test_merging_never_writes_over_anything(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert "exists and is not empty; give another --output" in refused(checkpoint, tmp_path / "full")
    assert "exists and is not empty" in refused(checkpoint, tmp_path / "full" / "precious.txt")
    (tmp_path / "empty").mkdir()
    merge(checkpoint, tmp_path / "empty")


RANK_FILE = "rank-00001-of-00003.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a rank's file is missing": (lambda folder: (folder / RANK_FILE).unlink(), f"{RANK_FILE} is missing"),
    "a rank's file is cut": (
        lambda folder: (folder / RANK_FILE).write_bytes((folder / RANK_FILE).read_bytes()[:-100]),
        f"{RANK_FILE} has ",
    ),
    "a rank's file is empty": (lambda folder: (folder / RANK_FILE).write_bytes(b""), f"{RANK_FILE} has 0 bytes of "),
    "a rank's file is of another save": (
        lambda folder: shutil.copy(
            make_checkpoint(folder.parent / "other", some_tensors(), saved_as="4567") / RANK_FILE, folder
        ),
        f"{RANK_FILE} is of another save than the manifest",
    ),
    "a bit of a master": (
        lambda folder: damage_tensor(folder / RANK_FILE, "1.master"),
        f"{RANK_FILE} is damaged in tensor 1.master",
    ),
    "a bit of a rank's header": (lambda folder: flip(folder / RANK_FILE, 200), f"{RANK_FILE} cannot be read"),
    "a bit of the layout": (lambda folder: flip(folder / "layout.json", 200), "layout.json is damaged"),
    "a bit of the tokenizer": (
        lambda folder: flip(folder / "model" / "tokenizer.json", 5),
        "tokenizer.json is damaged",
    ),
    "a bit of the manifest": (lambda folder: flip(folder / "manifest.json", 300), "manifest.json: is damaged"),
    "no config": (lambda folder: (folder / "model" / "config.json").unlink(), "model/config.json is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_it_and_nothing_is_written(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    spoil, wanted = DAMAGES[damage]
    spoil(checkpoint)
    message = refused(checkpoint, tmp_path / "models" / "merged")
    assert wanted in message
    assert str(checkpoint) in message
    assert not any((tmp_path / "models").glob("*"))


def test_damage_in_what_is_not_merged_does_no_harm(checkpoint: Path, tmp_path: Path) -> None:
    wanted = content_of(merge(checkpoint, tmp_path / "wanted"))
    damage_tensor(checkpoint / RANK_FILE, "1.exp_avg")
    flip(checkpoint / "trainer.json", 0)
    assert content_of(merge(checkpoint, tmp_path / "merged")) == wanted


def test_a_file_that_another_host_has_is_asked_of_it(checkpoint: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(checkpoint)
    Manifest(manifest.id, manifest.files, {"node-2": [RANK_FILE]}).write(checkpoint)
    (checkpoint / RANK_FILE).unlink()
    assert refused(checkpoint, tmp_path / "merged").endswith(f"{RANK_FILE} is missing; copy it from host node-2")


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert "no checkpoint here; give a step-N folder or a run's output folder" in refused(path, tmp_path / "merged")


def test_an_unknown_dtype_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    assert "--dtype int8: give bfloat16, float16, float32" in refused(checkpoint, tmp_path / "merged", dtype="int8")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_that_is_too_small_is_one_line(disk: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "step-1", {"large": values((1000, 300), 0)})
    assert "are to be written, 0.00 GiB are free; make room" in refused(checkpoint, disk / "merged")


def test_a_folder_that_cannot_be_written_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(checkpoint, tmp_path / "file" / "merged")
    assert message.startswith(f"{checkpoint}: could not be merged into {tmp_path / 'file' / 'merged'}: ")


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2**31, "1.5 kb": 1500, "7B": 7, "1tb": 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "5", "GB", "0GB", "-1GB", "5 gigabytes", "5G"):
        with pytest.raises(CheckpointError, match="--max-shard-size"):
            parse_size(text)
