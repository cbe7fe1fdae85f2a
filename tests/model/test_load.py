"""A model on ZeRO-3 is what `from_pretrained` gives, to the last bit, and no rank reads more than its share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from bigtune.config import Optim
from bigtune.dist import World
from bigtune.errors import ModelError
from bigtune.model import shards as shards_module
from bigtune.model.load import materialise_buffers, read_config, skeleton
from bigtune.model.vocabulary import companion_files
from bigtune.model.weights import Weights
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_model, tiny_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"attention_bias": True, "rope_parameters": ROPE}
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


def load_on_rank(folder: Path, precision: str, threshold: int) -> dict[str, Any]:
    """What a rank holds after loading: its partitions, the whole of each master value, buffers, bytes read."""
    from deepspeed.utils import safe_get_full_fp32_param

    world = World.from_environment()
    preset = read_preset("zero3")
    preset["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    counted, read_into = 0, shards_module._read_into

    def count(path: Path, offset: int, target: torch.Tensor) -> None:
        nonlocal counted
        counted += target.nbytes
        read_into(path, offset, target)

    shards_module._read_into = count
    try:
        engine = Engine(folder, Optim(), complete(preset, tiny_run(folder), precision, 36), precision, world)
    finally:
        shards_module._read_into = read_into
    masters = {}
    for name, parameter in engine.parameters.items():
        masters[name] = safe_get_full_fp32_param(parameter).cpu().numpy().copy()
    return {
        "bytes": counted,
        "masters": masters,
        "partitions": {
            name: parameter.ds_tensor.float().numpy().copy()  # type: ignore[attr-defined]
            for name, parameter in engine.parameters.items()
        },
        "buffers": {
            name: (str(b.dtype), b.float().numpy().copy()) for name, b in engine._engine.module.named_buffers()
        },
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0, 100_000])
@pytest.mark.parametrize("precision", DTYPES)
def test_partitions_put_together_are_the_pretrained_weights(
    folder: Path, precision: str, threshold: int, ranks: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])
    wanted = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    loaded = run_distributed(load_on_rank, ranks, folder, precision, threshold)
    for rank in loaded:
        assert rank["masters"].keys() == wanted.keys()
        assert all(torch.equal(torch.from_numpy(rank["masters"][name]), value) for name, value in wanted.items())
        for name, (dtype, values) in rank["buffers"].items():
            buffer = buffers[name.removeprefix("model.")]
            assert dtype == str(buffer.dtype)
            assert torch.equal(torch.from_numpy(values), buffer.float())
    for name, value in wanted.items():
        joined = torch.cat([torch.from_numpy(rank["partitions"][name]) for rank in loaded])
        assert torch.equal(joined[: value.numel()], value.flatten()), name
        assert not joined[value.numel() :].any()  # padding
    assert sum(rank["bytes"] for rank in loaded) == 4 * sum(value.numel() for value in wanted.values())
    if ranks > 1:
        assert max(rank["bytes"] for rank in loaded) < 1.1 / ranks * sum(rank["bytes"] for rank in loaded)


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
        assert torch.equal(torch.from_numpy(values), buffer.float()), name


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
