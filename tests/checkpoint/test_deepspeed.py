"""Checkpoints that DeepSpeed itself wrote are read as its own zero_to_fp32 reads them, and no code of one runs."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from bigtune.checkpoint.deepspeed import find, find_problems, of_deepspeed
from bigtune.checkpoint.merge import merge
from bigtune.checkpoint.source import Source, Tensor
from bigtune.errors import CheckpointError
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_model

NUMPY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class Case:
    """A checkpoint that DeepSpeed writes."""

    ranks: int
    precision: str
    tied: bool
    sub_group_size: int
    frozen: str = ""


CASES = {
    "1 rank": Case(1, "float32", tied=False, sub_group_size=10**9),
    "1 rank, bfloat16, sub-groups": Case(1, "bfloat16", tied=True, sub_group_size=5000, frozen="layers.0"),
    "2 ranks, sub-groups": Case(2, "float32", tied=False, sub_group_size=5000, frozen="norm"),
    "2 ranks, bfloat16": Case(2, "bfloat16", tied=True, sub_group_size=10**9, frozen="embed_tokens"),
    "3 ranks, sub-groups": Case(3, "float32", tied=True, sub_group_size=2000),
    "3 ranks, bfloat16, sub-groups": Case(3, "bfloat16", tied=False, sub_group_size=2000, frozen="layers.0"),
}


def save_with_deepspeed(model: Path, output: Path, case: Case) -> None:
    """On every rank: two steps of AdamW on ZeRO-3, and what `save_checkpoint` writes of it."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    module.register_buffer("scales", torch.arange(5, dtype=torch.float32) / 3)
    module.register_buffer("counts", torch.arange(3) + 7)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not case.frozen or case.frozen not in name)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": case.precision == "bfloat16"},
        "zero_optimization": {"stage": 3, "sub_group_size": case.sub_group_size},
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config)
    tokens = torch.arange(12)[None] + torch.distributed.get_rank()
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(output))


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Case]:
    """The folder that DeepSpeed saved in."""
    folder, case = tmp_path_factory.mktemp("saved"), CASES[request.param]
    run_distributed(save_with_deepspeed, case.ranks, tiny_llama(folder / "model", tied=case.tied), folder / "out", case)
    return folder / "out", case


def as_deepspeed_reads(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))


def assembled(source: Source) -> dict[str, torch.Tensor]:
    """Every tensor by each of its names, put together from its pieces."""
    tensors = {name: values_of(tensor) for name, tensor in {**source.tensors, **source.carried}.items()}
    return tensors | {name: tensors[kept] for name, kept in source.tied.items()}


def values_of(tensor: Tensor) -> torch.Tensor:
    parts: list[npt.NDArray[Any]] = []
    for piece in tensor.pieces:
        assert piece.start == sum(len(part) for part in parts)
        parts.append(np.fromfile(piece.path, NUMPY[tensor.dtype], piece.count, offset=piece.offset))
        assert len(parts[-1]) == piece.count > 0
    values = torch.from_numpy(np.concatenate(parts)).view(tensor.shape)
    return values.view(torch.bfloat16) if tensor.dtype == "BF16" else values


def differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not the same, bit for bit."""
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, tensor in theirs.items()
        if (ours[name].dtype, ours[name].shape) != (tensor.dtype, tensor.shape)
        or not torch.equal(ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    ]


def test_values_are_those_that_deepspeed_reads(saved: tuple[Path, Case]) -> None:
    folder, case = saved
    step = find(folder)
    assert step is not None and step == folder / "global_step2" == find(step)
    source, theirs = of_deepspeed(step), as_deepspeed_reads(folder)
    assert differing(assembled(source), theirs) == []
    assert source.dtype == case.precision
    assert source.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if case.tied else {})
    assert set(source.carried) == {"scales", "counts"}
    for name, tensor in source.tensors.items():  # master values, but of what was frozen those of training
        exact = case.frozen and case.frozen in name and case.precision == "bfloat16"
        assert tensor.dtype == ("BF16" if exact else "F32")
    assert source.model is None
    assert find_problems(step) == []


@pytest.mark.parametrize("saved", [name for name, case in CASES.items() if case.ranks > 1], indirect=True)
def test_ranks_in_another_order_would_differ(saved: tuple[Path, Case], tmp_path: Path) -> None:
    folder, case = saved
    step = shutil.copytree(folder / "global_step2", tmp_path / "global_step2")
    first, last = (next(step.glob(f"*zero_pp_rank_{rank}_*_optim_states.pt")) for rank in (0, case.ranks - 1))
    aside = first.rename(step / "aside")
    last.rename(first)
    aside.rename(last)
    assert differing(assembled(of_deepspeed(step)), as_deepspeed_reads(folder))


def test_a_bit_that_flipped_is_told(saved: tuple[Path, Case], tmp_path: Path) -> None:
    folder, _ = saved
    step = shutil.copytree(folder / "global_step2", tmp_path / "global_step2")
    source = of_deepspeed(step)
    *_, piece = source.tensors["model.layers.1.mlp.up_proj.weight"].pieces
    content = bytearray(piece.path.read_bytes())
    content[piece.offset + 4 * piece.count - 1] ^= 1  # in the last element that is no padding
    piece.path.write_bytes(content)
    changed = differing(assembled(of_deepspeed(step)), as_deepspeed_reads(folder))
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    (problem,) = find_problems(step)
    assert problem.file == piece.path.name and problem.what.startswith("is damaged in ")
    with pytest.raises(CheckpointError, match=rf"{piece.path.name} is damaged in .*; nothing is merged"):
        merge(step, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["global_step2"]
    assert of_deepspeed(step).id != source.id  # it was written again


def train_with_trainer(model: Path, output: Path) -> None:
    """On every rank: Hugging Face's Trainer, which saves on the way. What it leaves in the process is cleared."""
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
    }  # fmt: skip
    with mock.patch.dict(os.environ):
        arguments = TrainingArguments(
            str(output), deepspeed=config, use_cpu=True, bf16=True, max_steps=2, save_steps=1, report_to=[],
            per_device_train_batch_size=1, learning_rate=1e-2, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": list(range(9)), "labels": list(range(9))}] * 8
        module, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        Trainer(model=module, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()


def test_a_checkpoint_of_hugging_faces_trainer(tmp_path: Path) -> None:
    run_distributed(train_with_trainer, 2, tiny_model(tmp_path / "model"), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    step = find(folder)
    assert step is not None and step == folder / "global_step2"
    source = of_deepspeed(step)
    assert source.model == folder
    theirs = as_deepspeed_reads(folder)
    assert differing(assembled(source), theirs) == []
    merged = load_file(merge(folder, tmp_path / "merged", dtype="bfloat16") / "model.safetensors")
    assert differing(merged, {name: theirs[name].bfloat16() for name in theirs if name not in source.tied}) == []
    with pytest.raises(CheckpointError, match="several checkpoints of DeepSpeed's; give one of checkpoint-1, check"):
        find(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    assert find(tmp_path / "run") == step
