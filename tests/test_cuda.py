"""What holds on the CPU holds on CUDA: on one GPU, with NCCL, real kernels and bfloat16. Not run without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bigtune.checkpoint.merge import merge
from bigtune.data.prepare import prepare
from bigtune.runfile import to_yaml
from tests.checkpoint.test_merge import whole_parameters
from tests.distributed import GPUS, run_distributed
from tests.tiny import tiny_family, tiny_llama, tiny_model, tiny_run, write_rows
from tests.train.test_families import EXPERTS, OWN, reference, rows, step_on_rank
from tests.train.test_loss import ALIKE, reference_gradients, worst, zero3_gradients
from tests.training import differing, metrics, step, train

ALIGNED = {"hidden_size": 48, "head_dim": 8}
"""Rows of a multiple of 16 bytes in bfloat16, which CUDA's grouped products of experts need."""

pytestmark = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="needs an NVIDIA GPU")


def gpu_environment() -> dict[str, str]:
    """The environment of a command that may see the GPUs which tests hide."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return environment if GPUS is None else environment | {"CUDA_VISIBLE_DEVICES": GPUS}


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_are_those_of_transformers_on_the_cpu(
    tmp_path: Path, tied: bool, precision: str, bound: float
) -> None:
    folder = tiny_llama(tmp_path, tied=tied)
    (gradients,) = run_distributed(zero3_gradients, 1, folder, precision, 0, "global", ALIKE, cuda=True)
    assert worst(gradients, reference_gradients(folder, ALIKE)) < bound


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox", "granite", "mistral", "mixtral", "qwen3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_of_families_are_those_of_transformers_on_the_cpu(
    tmp_path: Path, model_type: str, precision: str
) -> None:
    """Windows, soft caps, scaled logits and experts, by whatever kernels this machine has. In bfloat16 they are at most
    twice as far off as transformers' own."""
    folder = tiny_family(tmp_path, model_type, experts=EXPERTS, **{**OWN[model_type], **ALIGNED})
    exact, bound = reference(folder)[0], 1e-4
    if precision == "bfloat16":
        bound = max(5e-2, 2 * worst(reference(folder, dtype=torch.bfloat16)[0], exact))
    ((gradients, _),) = run_distributed(step_on_rank, 1, folder, [rows()], precision, cuda=True)
    assert worst(gradients, exact) < bound


@pytest.mark.parametrize("preset", ["zero3", "zero3_offload"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_chain_stops_resumes_and_merges_to_the_last_bit(
    tmp_path: Path, preset: str, optimizer: str, precision: str
) -> None:
    tiny_model(tmp_path / "model", dtype=precision)
    write_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {
        "optim__name": optimizer, "train__precision": precision, "train__steps": 6, "checkpoint__every_steps": 3,
        "data__store": str(tmp_path / "store"), "deepspeed": preset,
    }  # fmt: skip
    whole = tiny_run(tmp_path, **settings, output=str(tmp_path / "whole"))
    stopped = tiny_run(tmp_path, **settings, output=str(tmp_path / "stopped"))
    prepare(whole.data, whole.model.path, whole.store)
    train(whole, ranks=1, cuda=True)
    train(stopped, ranks=1, stop_after=3, cuda=True)
    train(stopped, ranks=1, cuda=True)
    assert metrics(stopped) == metrics(whole)
    assert metrics(whole)[-1]["loss"] < metrics(whole)[0]["loss"]
    assert differing(step(stopped, 6), step(whole, 6)) == []
    assert differing(step(stopped, 3), step(whole, 6)) != []
    merged = dict(AutoModelForCausalLM.from_pretrained(merge(whole.output, tmp_path / "merged")).named_parameters())
    for name, value in whole_parameters(step(whole, 6)).items():
        assert torch.equal(merged[name], value.to(merged[name].dtype)), name


def test_the_commands_take_the_gpu_by_themselves(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    sources = [{"path": str(tmp_path / "rows.jsonl")}]
    run = tiny_run(tmp_path, train__precision="auto", evaluate__sources=sources, evaluate__max_new_tokens=8)
    (tmp_path / "run.yaml").write_text(to_yaml(run), encoding="utf-8")

    def bigtune(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "bigtune.cli", *map(str, arguments)]
        return subprocess.run(command, env=gpu_environment(), capture_output=True, text=True, timeout=300, check=False)

    trained = bigtune("train", tmp_path / "run.yaml")
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"^train: 6 steps .* on \d+ ranks?, cuda, bfloat16", trained.stdout, re.MULTILINE)
    assert bigtune("merge", run.output, "--output", tmp_path / "merged").returncode == 0
    evaluated = bigtune("evaluate", tmp_path / "run.yaml", "--model", tmp_path / "merged", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert '"device": "cuda:0"' in evaluated.stdout
    refused = bigtune("train", tmp_path / "run.yaml", "--ranks", "1000", "--oversubscribe")
    assert re.search(r"^Error: --ranks 1000: this host has \d+ GPUs?; give at most --ranks \d+$", refused.stderr)
