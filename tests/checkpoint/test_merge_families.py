"""A merged model of any family reloads as what was trained, in files as the base model's are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bigtune.checkpoint.merge import merge
from bigtune.data.prepare import prepare
from bigtune.runfile import load_run
from tests.checkpoint.test_merge import whole_parameters
from tests.tiny import tiny_family, tiny_run, tiny_tokenizer, write_rows
from tests.train.test_families import OWN
from tests.training import metrics, step, train

QUICK = ("gemma2", "gpt_neox", "mixtral")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OWN if name not in QUICK]


def names(folder: Path) -> dict[str, list[int]]:
    """Tensors of a folder's files, with their shapes."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def trained(folder: Path, model_type: str, **changes: Any) -> Path:
    """The checkpoint of a step on two ranks."""
    tiny_tokenizer(folder / "model")
    tiny_family(folder / "model", model_type, **OWN.get(model_type, {}), **changes)
    write_rows(folder / "rows.jsonl", 12)
    run = tiny_run(folder, train__steps=1, train__global_batch=2, optim__name="adamw")
    prepare(run.data, run.model.path, run.store)
    train(run)
    return step(run, 1)


@pytest.mark.parametrize("model_type", [*QUICK, *SLOW])
def test_a_merged_model_reloads_equal(model_type: str, tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, model_type)
    merged = merge(checkpoint, tmp_path / "merged")
    wanted = whole_parameters(checkpoint)
    reloaded = dict(AutoModelForCausalLM.from_pretrained(merged).named_parameters())
    assert reloaded.keys() == wanted.keys()
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in reloaded.items())
    (line,) = metrics(load_run(checkpoint / "run.yaml"))
    assert (line.get("router_aux_loss", 0.0) > 0.1) is (model_type in ("mixtral", "qwen3_moe"))
    assert names(merged) == names(tmp_path / "model")  # experts apart as there, whatever reads them
    base = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert not all(torch.equal(parameter, base[name]) for name, parameter in reloaded.items())


def test_what_is_no_parameter_is_carried_over(tmp_path: Path) -> None:
    """Apertus keeps constants of its activation in its files."""
    checkpoint = trained(tmp_path, "apertus", max_position_embeddings=16384)
    base, merged = tmp_path / "model", merge(checkpoint, tmp_path / "merged")
    assert names(merged) == names(base)
    tensors = load_file(base / "model.safetensors")
    buffers = [name for name in tensors if name.endswith("act_fn.beta")]
    assert buffers
    assert all(torch.equal(load_file(merged / "model.safetensors")[name], tensors[name]) for name in buffers)


def test_a_merged_model_of_other_experts_would_be_seen(tmp_path: Path) -> None:
    """The mutation: two experts change places."""
    checkpoint = trained(tmp_path, "mixtral")
    merged = merge(checkpoint, tmp_path / "merged")
    file = merged / "model.safetensors"
    tensors = load_file(file)
    one, other = (next(name for name in tensors if f"experts.{i}.w1" in name) for i in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = whole_parameters(checkpoint)
    reloaded = dict(AutoModelForCausalLM.from_pretrained(merged).named_parameters())
    assert not all(torch.equal(parameter, wanted[name]) for name, parameter in reloaded.items())
