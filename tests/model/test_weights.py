"""A model's parameters are found in its files, whole or in pieces, as transformers itself would load them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bigtune.errors import ModelError
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
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")


def check(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Weights.of(skeleton(folder, torch.float32), folder)
    return str(caught.value)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    Weights.of(skeleton(folder, torch.float32), folder)
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" in name])
    assert "the files lack 5 tensors of the model: model.layers.0.input_layernorm.weight, model.layers" in check(folder)
    assert "and 2 more" in check(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(35)}))
    assert "tensor model.norm.weight has shape [35], the config asks for [36]" in check(folder)


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
