"""A model's parameters are found in its files, whole or in pieces, as transformers itself would load them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bigtune.errors import ModelError
from bigtune.model import weights as weights_module
from bigtune.model.load import skeleton
from bigtune.model.weights import Weights
from tests.tiny import tiny_family, tiny_llama


def rewrite(folder: Path, change: Any) -> None:
    """Put all of a folder's tensors into one file, changed."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")


def check(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Weights.of(skeleton(folder, torch.float32), folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def whole(folder: Path, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
    """Elements of a parameter, flattened, as they are read."""
    model = skeleton(folder, torch.float32)
    out = torch.empty(model.get_parameter(name).numel() - start if count is None else count)
    Weights.of(model, folder).read(name, start, len(out), out)
    return out


def unexpected(folder: Path) -> list[str]:
    return list(Weights.of(skeleton(folder, torch.float32), folder).unexpected)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    Weights.of(skeleton(folder, torch.float32), folder)
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" in name])
    assert "the files lack 5 of the model's tensors: model.layers.0.input_layernorm.weight, model.layers" in check(
        folder
    )
    assert "and 2 more; download them again, or give the config.json that belongs to the files" in check(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(35)}))
    assert "tensor model.norm.weight has shape [35], the config asks for [36]" in check(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.tensor(1.0)}))
    assert "tensor model.norm.weight has shape [], the config asks for [36]" in check(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_dtype_that_is_not_read_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    found = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8"}[dtype]
    assert f"tensor {name} is {found}, a dtype that bigtune does not read; bigtune trains models of" in check(folder)


def test_packed_weights_are_named_where_weights_are_missing(tmp_path: Path) -> None:
    """As GPTQ and its like have them."""
    folder = tiny_llama(tmp_path)
    layer = "model.layers.0.mlp.up_proj"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{layer}.weight"]
        tensors[f"{layer}.qweight"] = torch.zeros(5, 50, dtype=torch.int32)

    rewrite(folder, pack)
    message = (
        f"the files lack 1 of the model's tensors: {layer}.weight; they hold {layer}.qweight as I32; bigtune trains"
    )
    assert message in check(folder)


# -------------------------------------------------------------------------------------------- unexpected


def test_tensors_that_the_model_has_no_place_for_are_told_of(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    assert unexpected(folder) == []
    more = {
        "model.layers.10.mlp.up_proj.weight": torch.ones(50, 36),
        "model.layers.2.mlp.up_proj.weight": torch.ones(50, 36),
        "steps": torch.tensor(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),  # of files of old, and computed now
    }
    rewrite(folder, lambda tensors: tensors.update(more))
    assert unexpected(folder) == ["model.layers.2.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight", "steps"]
    # As transformers itself reports.
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(report["unexpected_keys"]) == set(unexpected(folder))


def test_what_a_type_declares_to_be_of_no_use_is_not_told_of(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "gpt2")
    tensors = load_file(folder / "model.safetensors")
    more = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.gate": torch.ones(2)}
    save_file(tensors | more, folder / "model.safetensors")
    assert unexpected(folder) == ["transformer.h.0.attn.gate"]


def test_a_parameter_that_the_files_hold_under_two_names_is_the_one_of_the_models(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "gpt2")
    name = "transformer.h.0.ln_1.bias"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"h.0.ln_1.bias": torch.ones(36)}, folder / "model.safetensors")
    assert unexpected(folder) == ["h.0.ln_1.bias"]
    assert torch.equal(whole(folder, name), tensors[name])


# -------------------------------------------------------------------------------------------------- tied

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_parameter_is_found_under_either_name_as_by_transformers(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDINGS)}))
    wanted = AutoModelForCausalLM.from_pretrained(folder).get_parameter(EMBEDDINGS).detach().flatten()
    assert torch.equal(whole(folder, EMBEDDINGS), wanted)
    assert unexpected(folder) == []
    weights = Weights.of(skeleton(folder, torch.float32), folder)
    assert weights.joined == {EMBEDDINGS: {HEAD: (321, 36)}}  # a merged model has the names of its files


def test_a_tied_parameter_may_be_there_twice_if_it_is_the_same(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    wanted = AutoModelForCausalLM.from_pretrained(folder).get_parameter(EMBEDDINGS).detach().flatten()
    assert torch.equal(whole(folder, EMBEDDINGS), wanted)
    assert unexpected(folder) == []


@pytest.mark.parametrize("block", [weights_module.BLOCK, 1000])
def test_tied_names_with_other_values_are_refused_by_the_rank_that_has_them(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers unties them, and tells so; trained as one, the model would be another than its files'."""
    monkeypatch.setattr(weights_module, "BLOCK", block)
    folder = tiny_llama(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
        tensors[HEAD][200, 7] += 1.0

    rewrite(folder, change)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(model.get_parameter(EMBEDDINGS), model.get_parameter(HEAD))
    at = 200 * 36 + 7
    whole(folder, EMBEDDINGS, 0, at)
    whole(folder, EMBEDDINGS, at + 1)
    with pytest.raises(ModelError) as caught:
        whole(folder, EMBEDDINGS)
    assert str(caught.value) == (
        f"{folder}: {EMBEDDINGS} and {HEAD} hold other values, though the config ties them; if both are meant, set "
        "tie_word_embeddings to false in its config.json"
    )
    untied = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(untied))
    assert not torch.equal(whole(folder, HEAD), whole(folder, EMBEDDINGS))


def test_tied_names_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS][:-1].clone()}))
    assert f"tensor {HEAD} has shape [320, 36], the config asks for [321, 36]" in check(folder)


# ----------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("original", [True, False], ids=["experts apart", "experts joined"])
def test_experts_are_read_as_transformers_joins_them(model_type: str, original: bool, tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, model_type, experts=11, save_original_format=original)
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    weights = Weights.of(skeleton(folder, torch.float32), folder)
    names = [name for name in wanted if "experts.gate_up_proj" in name]
    assert names
    assert all(len(weights.pieces[name]) == (22 if original else 1) for name in names)
    for name, parameter in wanted.items():
        flat = parameter.detach().flatten()
        # Ranks' shares: neither begins nor ends where a piece does.
        for world in (1, 3):
            length = -(-len(flat) // world)
            for start in range(0, len(flat), length):
                out = torch.zeros(length)
                count = min(length, len(flat) - start)
                weights.read(name, start, count, out)
                assert torch.equal(out[:count], flat[start : start + count]), name


def test_experts_in_another_order_would_be_seen(tmp_path: Path) -> None:
    """The mutation: the 10th expert before the 2nd, as plain sorting has it."""
    folder = tiny_family(tmp_path, "mixtral", experts=11)
    weights = Weights.of(skeleton(folder, torch.float32), folder)
    name = "model.layers.0.mlp.experts.down_proj"
    wanted = AutoModelForCausalLM.from_pretrained(folder).get_parameter(name).detach().flatten()
    weights.pieces[name] = tuple(sorted(weights.pieces[name]))
    out = torch.zeros_like(wanted)
    weights.read(name, 0, len(wanted), out)
    assert not torch.equal(out, wanted)


def test_files_of_the_base_model_alone_are_found(tmp_path: Path) -> None:
    """As GPT-2's are on the hub: without the prefix that the language model has."""
    folder = tiny_family(tmp_path, "gpt2")
    wanted = AutoModelForCausalLM.from_pretrained(folder).transformer.wte.weight.detach().flatten()
    rename = {name: name.removeprefix("transformer.") for name in load_file(folder / "model.safetensors")}
    tensors = load_file(folder / "model.safetensors")
    save_file({rename[name]: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    out = torch.zeros_like(wanted)
    Weights.of(skeleton(folder, torch.float32), folder).read("transformer.wte.weight", 0, len(wanted), out)
    assert torch.equal(out, wanted)


def test_an_expert_that_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "mixtral", experts=3)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.1.w3.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")
    assert "the files lack some of the" in check(folder)
    assert "experts.gate_up_proj; download them again" in check(folder)
    save_file(tensors | {name: torch.zeros(1, 7)}, folder / "model.safetensors")
    assert "experts.gate_up_proj is made of 6 of shape [1, 7] and [48, 36]" in check(folder)
