"""A model on ZeRO-3 is what `from_pretrained` gives, to the last bit, and no rank reads more than its share."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from bigtune.config import Optim
from bigtune.dist import World
from bigtune.errors import ModelError
from bigtune.model import shards as shards_module
from bigtune.model.companions import companion_files
from bigtune.model.initial import Initial
from bigtune.model.load import materialise_buffers, read_config, replace_parameters, skeleton
from bigtune.model.shards import Shards
from bigtune.model.weights import Weights
from bigtune.tensorfile import BYTES, read_into
from bigtune.train import engine as engine_module
from bigtune.train import zero3
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_model, tiny_run
from tests.training import memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip

SMALL = {"hidden_size": 3, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4,
         "vocab_size": 5}  # fmt: skip
"""Parameters of which four ranks do not get an element each."""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"attention_bias": True, "rope_parameters": ROPE, "head_dim": 6}
    changes |= {"hidden_size": 35, "num_attention_heads": 5, "num_key_value_heads": 1}  # ranks get padding
    return tiny_llama(tmp_path_factory.mktemp("model"), tied=request.param, **changes)


def test_a_skeleton_holds_no_memory_and_has_the_models_names(folder: Path) -> None:
    model = skeleton(folder, torch.bfloat16)
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in wanted.items()}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training


@pytest.mark.parametrize("precision", DTYPES)
def test_buffers_are_those_of_from_pretrained(folder: Path, precision: str) -> None:
    model = skeleton(folder, DTYPES[precision])
    materialise_buffers(model, Weights.of(model, folder), torch.device("cpu"))
    assert_same_buffers(dict(model.named_buffers()), folder, DTYPES[precision])


def assert_same_buffers(buffers: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).named_buffers())
    assert buffers.keys() == wanted.keys() != set()
    for name, buffer in wanted.items():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name


def load_on_rank(folder: Path, precision: str, threshold: int | None, mutation: str = "") -> dict[str, Any]:
    """What a rank holds after loading: see `differences`."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    counted = 0

    def count(path: Path, offset: int, target: memoryview) -> None:
        nonlocal counted
        counted += target.nbytes
        read_into(path, offset, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "read_into", count)
        if mutation:
            MUTATIONS[mutation][1](patch)
        with memory(shared=threshold is None):
            config = ds_config(folder, precision, threshold)
            engine = Engine(folder, Optim(), config, precision, World.from_environment())
    module, parameters = engine._engine.module, engine.parameters
    masters = {name: as_array(safe_get_full_fp32_param(parameter)) for name, parameter in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        gathered = {name: as_array(parameter) for name, parameter in parameters.items()}
    every = [id(parameter) for _, parameter in module.model.named_parameters(remove_duplicate=False)]
    return {
        "bytes": counted,
        "masters": masters,
        "gathered": gathered,
        "partitions": {name: as_array(parameter.ds_tensor) for name, parameter in parameters.items()},  # type: ignore[attr-defined]
        "buffers": {name: (str(buffer.dtype), as_array(buffer)) for name, buffer in module.named_buffers()},
        "ties": len(every) - len(set(every)),
    }


def ds_config(folder: Path, precision: str, threshold: int | None) -> dict[str, Any]:
    """`threshold` is DeepSpeed's size of parameters that stay gathered, on ranks that share no memory; else None."""
    preset = read_preset("zero3")
    if threshold is not None:
        preset["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    return complete(preset, tiny_run(folder), precision, 36)


def as_array(tensor: Any) -> Any:
    return tensor.detach().float().cpu().numpy().copy()


def differences(loaded: list[dict[str, Any]], folder: Path, precision: str) -> set[str]:
    """In what the ranks together differ from `from_pretrained`, whose values they have to the last bit.

    `masters` are the optimizer's float32 values; `gathered` the parameters as the model computes with them;
    `partitions` and `padding` each rank's own elements of them, and what stands behind the last; `buffers` with their
    dtypes; `ties` how many parameters stand in two places; `bytes` that the files are read once, by no rank more than
    its share.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])
    wanted = {name: as_array(parameter) for name, parameter in model.named_parameters()}
    buffers = {f"model.{name}": (str(buffer.dtype), as_array(buffer)) for name, buffer in model.named_buffers()}
    ties = len(list(model.named_parameters(remove_duplicate=False))) - len(wanted)
    places = Shards(folder).places.values()
    found = set()
    for rank in loaded:
        found |= {kind for kind in ("masters", "gathered") if not same(rank[kind], wanted)}
        dtypes = {name: dtype for name, (dtype, _) in rank["buffers"].items()}
        values = {name: value for name, (_, value) in rank["buffers"].items()}
        if dtypes != {name: dtype for name, (dtype, _) in buffers.items()}:
            found.add("buffers")
        if not same(values, {name: value for name, (_, value) in buffers.items()}):
            found.add("buffers")
        if rank["ties"] != ties:
            found.add("ties")
        if rank["bytes"] > sum(-(-place.numel // len(loaded)) * BYTES[place.dtype] for place in places):
            found.add("bytes")
    for name, value in wanted.items():
        joined = np.concatenate([rank["partitions"][name] for rank in loaded])
        if not np.array_equal(joined[: value.size], value.ravel()):
            found.add("partitions")
        if joined[value.size :].any() or len(joined) - value.size >= len(loaded):
            found.add("padding")
    if sum(rank["bytes"] for rank in loaded) != sum(place.nbytes for place in places):
        found.add("bytes")
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0, 100_000, None])
@pytest.mark.parametrize("precision", DTYPES)
def test_partitions_put_together_are_the_pretrained_weights(
    folder: Path, precision: str, threshold: int | None, ranks: int
) -> None:
    loaded = run_distributed(load_on_rank, ranks, folder, precision, threshold)
    assert differences(loaded, folder, precision) == set()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("threshold", [0, 100_000, None])
@pytest.mark.parametrize("precision", DTYPES)
def test_parameters_smaller_than_the_world_leave_ranks_with_padding_alone(
    tmp_path: Path, precision: str, threshold: int | None, width: int
) -> None:
    folder = tiny_llama(tmp_path, tied=width == 1, **SMALL | {"hidden_size": width})
    loaded = run_distributed(load_on_rank, 4, folder, precision, threshold)
    assert differences(loaded, folder, precision) == set()
    assert not any(values.any() for name, values in loaded[3]["partitions"].items() if "norm" in name)
    assert loaded[3]["bytes"] < loaded[0]["bytes"]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("precision", DTYPES)
def test_files_of_several_dtypes_are_cast_as_from_pretrained_does(tmp_path: Path, precision: str, ranks: int) -> None:
    folder = mixed(tmp_path)
    loaded = run_distributed(load_on_rank, ranks, folder, precision, 0)
    assert differences(loaded, folder, precision) == set()


def mixed(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with a tensor in float32, float16, bfloat16 and float64 by turns, and the ends of their ranges."""
    tiny_llama(folder, **changes)
    dtypes = itertools.cycle([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, dtype in zip(tensors, dtypes):  # noqa: B905  # without an end
            ends = torch.tensor([torch.finfo(torch.float16).max, 6e-8, -0.0, 1 + 2**-8, 1 + 3 * 2**-8])
            tensors[name].view(-1)[: len(ends)] = ends[: tensors[name].numel()]
            tensors[name] = tensors[name].to(dtype)
        save_file(tensors, path, {"format": "pt"})
    assert {place.dtype for place in Shards(folder).places.values()} == {"F32", "F16", "BF16", "F64"}
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_that_pad_the_vocabulary_are_loaded_too(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model(tmp_path, vocab_size=384, tied=tied)
    assert len(AutoTokenizer.from_pretrained(folder)) < 300
    loaded = run_distributed(load_on_rank, 2, folder, "bfloat16", 0)
    assert differences(loaded, folder, "bfloat16") == set()
    assert loaded[0]["masters"]["model.embed_tokens.weight"][300:].all(axis=1).any()


@pytest.mark.parametrize(("ranks", "threshold"), [(2, 100_000), (4, 0)])
@pytest.mark.parametrize("precision", DTYPES)
def test_every_rank_has_what_transformers_itself_partitions(
    folder: Path, precision: str, threshold: int | None, ranks: int
) -> None:
    loaded = run_distributed(load_on_rank, ranks, folder, precision, threshold)
    wanted = run_distributed(load_by_transformers, ranks, folder, precision, threshold)
    assert not unlike(loaded, wanted)
    late = run_distributed(load_on_rank, ranks, folder, precision, threshold, "one element late")
    assert len(unlike(late, wanted)) == len(wanted[0])


def unlike(loaded: list[dict[str, Any]], wanted: list[dict[str, tuple[Any, int]]]) -> set[str]:
    """The parameters whose partition differs on some rank; what stands in its padding does not count."""
    found = set(loaded[0]["partitions"]) ^ set(wanted[0])
    for ours, theirs in zip(loaded, wanted, strict=True):
        for name, (values, elements) in theirs.items():
            mine = ours["partitions"][name]
            if len(mine) != len(values) or not np.array_equal(mine[:elements], values[:elements]):
                found.add(name)
    return found


def load_by_transformers(folder: Path, precision: str, threshold: int) -> dict[str, tuple[Any, int]]:
    """This rank's partitions after `from_pretrained` under ZeRO-3, and how many elements of each are no padding."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    world = World.from_environment()
    alive = HfDeepSpeedConfig(ds_config(folder, precision, threshold))  # transformers looks whether there is one
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])
    finally:
        del alive
        unset_hf_deepspeed_config()
    found = {}
    for name, parameter in model.named_parameters():
        values = as_array(parameter.ds_tensor)
        found[name] = values, min(len(values), max(0, parameter.ds_numel - len(values) * world.rank))
    return found


# ---------------------------------------------------------------------------------------------- mutations


def _one_element_late(patch: pytest.MonkeyPatch) -> None:
    read = Initial.read
    patch.setattr(Initial, "read", lambda self, name, start, count, out: read(self, name, start + 1, count - 1, out))


def _more_than_its_share(patch: pytest.MonkeyPatch) -> None:
    read = Initial.read

    def twice(self: Initial, name: str, start: int, count: int, out: torch.Tensor) -> None:
        read(self, name, start, count, out)
        read(self, name, start, count, out)

    patch.setattr(Initial, "read", twice)


def _into_the_padding(patch: pytest.MonkeyPatch) -> None:
    rank = World.from_environment().rank

    def spoiled(model: Any, new: Any) -> Any:
        def spoil(name: str, old: Any) -> Any:
            parameter = new(name, old)
            partition = parameter.ds_tensor
            partition[max(0, parameter.ds_numel - len(partition) * rank) :] = 1.0
            return parameter

        return replace_parameters(model, spoil)

    patch.setattr(zero3, "replace_parameters", spoiled)


def _float16_taken_for_bfloat16(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(shards_module.DTYPES, "F16", torch.bfloat16)


def _buffers_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    def rounded(model: Any, weights: Weights, device: torch.device) -> None:
        materialise_buffers(model, weights, device)
        for buffer in model.buffers():
            buffer.copy_(buffer.bfloat16())

    patch.setattr(engine_module, "materialise_buffers", rounded)


def _tied_ones_apart(patch: pytest.MonkeyPatch) -> None:
    def apart(model: Any, new: Any) -> Any:
        made = replace_parameters(model, new)
        kept = model.get_input_embeddings().weight
        model.get_output_embeddings().weight = new("model.embed_tokens.weight", torch.empty(kept.ds_shape))
        return made

    patch.setattr(zero3, "replace_parameters", apart)


def _stale_after_initialize(patch: pytest.MonkeyPatch) -> None:
    """The masters are right, and the model computes with other values."""
    refuse = zero3.refuse_non_finite

    def spoil(zero: Any) -> None:
        refuse(zero)
        zero.fp16_groups[0][0].ds_tensor.add_(1.0)

    patch.setattr(zero3, "refuse_non_finite", spoil)


MUTATIONS: dict[str, tuple[set[str], Callable[[pytest.MonkeyPatch], None]]] = {
    "one element late": ({"masters", "gathered", "partitions", "bytes"}, _one_element_late),
    "more than its share": ({"bytes"}, _more_than_its_share),
    "into the padding": ({"padding"}, _into_the_padding),
    "float16 taken for bfloat16": ({"masters", "gathered", "partitions"}, _float16_taken_for_bfloat16),
    "buffers in bfloat16": ({"buffers"}, _buffers_in_bfloat16),
    "tied ones apart": ({"ties", "bytes"}, _tied_ones_apart),
    "stale after initialize": ({"gathered", "partitions"}, _stale_after_initialize),
}


@pytest.mark.parametrize(
    ("mutation", "threshold"),
    # In shared memory there is no place for one that no one counted.
    [*((name, 0) for name in MUTATIONS), *((name, None) for name in MUTATIONS if name != "tied ones apart")],
)
def test_what_is_not_loaded_right_would_be_seen(mutation: str, threshold: int | None, tmp_path: Path) -> None:
    folder = mixed(tmp_path, **SMALL)
    loaded = run_distributed(load_on_rank, 4, folder, "bfloat16", threshold, mutation)
    assert differences(loaded, folder, "bfloat16") == MUTATIONS[mutation][0]


# ------------------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("precision", DTYPES)
def test_buffers_beside_weights_load_too(tmp_path: Path, precision: str) -> None:
    """Gemma 3 scales its embeddings by a buffer, and transformers fills it together with the weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3TextConfig(vocab_size=64, num_key_value_heads=1, head_dim=16, pad_token_id=0, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    (rank,) = run_distributed(load_on_rank, 1, tmp_path, precision, 0)
    wanted = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPES[precision]).named_buffers())
    assert "model.embed_tokens.embed_scale" in wanted
    for name, buffer in wanted.items():
        dtype, values = rank["buffers"][f"model.{name}"]
        assert dtype == str(buffer.dtype)
        assert np.array_equal(values, as_array(buffer)), name


# ---------------------------------------------------------------------------------------------- bad input


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path: /.*/none is no folder"):
        read_config(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_config(tmp_path)
    for text in ("", "{", "{}", "[]", '{"model_type": "novel"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json: "):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="models of type vit predict no next token; give a decoder"):
        skeleton(tmp_path, torch.float32)


@pytest.mark.parametrize("model_type", ["gemma3", "mllama", "qwen3_5"])
def test_a_model_of_more_than_text_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"a {model_type} model has parts for more than text"):
        read_config(tmp_path)


def test_what_makes_a_model_of_the_weights_is_found(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
        companion_files(folder)
    )
    assert not [name for name in companion_files(folder) if "safetensors" in name]
