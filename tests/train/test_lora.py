"""LoRA under ZeRO-3: the gradients of peft alone on any number of ranks, from first values that no rank decides."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bigtune.config import Adapter, Optim
from bigtune.data.collate import collate
from bigtune.data.deal import deal
from bigtune.dist import World
from bigtune.errors import ConfigError
from bigtune.model.adapter import find_targets
from bigtune.model.folds import is_adapter
from bigtune.model.initial import first_values
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from bigtune.train.optim import parameter_groups
from bigtune.train.probe import prove
from tests.distributed import run_distributed
from tests.model.test_families import OWN, SMALL
from tests.tiny import tiny_llama, tiny_run
from tests.train.test_loss import WEIGHTED, Gradients, learn_each_alone, worst
from tests.train.test_probe import HYBRID

ADAPTER = Adapter(rank=3, alpha=5.0)
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")
OTHERS = ("cohere", "gemma3_text", "granite", "lfm2", "mistral", "mixtral", "olmo2", "phi", "qwen3", "qwen3_moe")


def values_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Adapters as they are in the middle of a run: B is 0 at its start, and the gradient of A then too."""
    return first_values(name.replace("lora_B", "lora_A"), shape, seed=7)


def engine_of(folder: Path, adapter: Adapter | None = ADAPTER, recompute: str | int = "none") -> Engine:
    world = World.from_environment()
    preset = read_preset("zero3")
    preset["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    run = tiny_run(folder, optim__max_grad_norm=0.0)
    engine = Engine(
        folder, Optim(), complete(preset, run, "float32", 36), "float32", world,
        activation_checkpointing=recompute, adapter=adapter, seed=3,
    )  # fmt: skip
    prove(engine, 50, print)
    return engine


def zero3_gradients(folder: Path, adapter: Adapter, scale: float, recompute: str | int = "none") -> Gradients:
    """Gradients of one global batch, with the adapters of `values_of`; called on each rank."""
    from deepspeed.utils import safe_get_full_grad

    engine, world = engine_of(folder, adapter, recompute), World.from_environment()
    for part in engine.partitions():
        for place in part.parameters:
            if is_adapter(place.name):
                padded = torch.zeros(place.length * world.world_size)
                padded[: place.numel] = scale * values_of(place.name, place.shape).view(-1)
                mine = padded[place.length * world.rank :][: place.length]
                part.master.data[place.offset : place.offset + place.length] = mine
    engine.refresh()
    work, supervised = (np.array([getattr(row, load) for row in WEIGHTED]) for load in ("work", "supervised"))
    slots = deal(work, supervised, world.data_world, micro_batch=1, global_batch=4)
    batches = [collate([WEIGHTED[i] for i in micro_step if i >= 0]) for micro_step in slots[world.data_rank]]
    weight = collate(WEIGHTED).weight
    for index, batch in enumerate(batches):
        engine.micro_step(batch, weight, 1, last=index == len(batches) - 1)
    trained = {name: p for name, p in engine.parameters.items() if p.requires_grad}
    return {name: safe_get_full_grad(p).float().numpy().copy() for name, p in trained.items()}


def peft_model(folder: Path, adapter: Adapter = ADAPTER) -> Any:
    """peft's own model around transformers' own, with the adapters of `values_of`."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, use_rslora=adapter.use_rslora,
        target_modules=adapter.target_modules if adapter.target_modules == "all-linear" else [*adapter.target_modules],
        modules_to_save=[*adapter.modules_to_save] or None,
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if is_adapter(plain(name)):
                parameter.copy_(values_of(plain(name), tuple(parameter.shape)))
    return wrapped


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")


def reference_gradients(folder: Path, adapter: Adapter = ADAPTER) -> Gradients:
    model = peft_model(folder, adapter)
    learn_each_alone(model, WEIGHTED)
    return {plain(name): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"), request.param)


def small_model(folder: Path, model_type: str) -> Path:
    """Of the family, with a vocabulary for the documents, and layers that are square: what is transposed shows."""
    changes: dict[str, Any] = {"vocab_size": 321, "intermediate_size": 32, "n_inner": 32, "router_aux_loss_coef": 0.0}
    changes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # of GPT-2, when it is trained
    own = {**OWN, "lfm2": HYBRID}.get(model_type, {})
    config = AutoConfig.for_model(model_type, **{**SMALL, **own, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_are_those_of_peft_on_any_number_of_ranks(folder: Path, ranks: int) -> None:
    reference = reference_gradients(folder)
    assert reference
    for gradients in run_distributed(zero3_gradients, ranks, folder, ADAPTER, 1.0):
        assert worst(gradients, reference) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_gradients_are_those_of_peft_in_other_families(model_type: str, tmp_path: Path) -> None:
    folder = small_model(tmp_path, model_type)
    # Of mixtures the layers of attention: peft's `all-linear` has their routers and experts too, bigtune's has not.
    attention = {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
    adapter = ADAPTER.model_copy(update=attention if model_type in ("mixtral", "qwen3_moe") else {})
    wanted = reference_gradients(folder, adapter)
    for gradients in run_distributed(zero3_gradients, 2, folder, adapter, 1.0):
        assert worst(gradients, wanted) < 1e-5


@pytest.mark.parametrize("recompute", ["full", pytest.param(2, marks=pytest.mark.slow)])
def test_layers_that_are_computed_again_change_no_bit_of_them(folder: Path, recompute: str | int) -> None:
    wanted = run_distributed(zero3_gradients, 2, folder, ADAPTER, 1.0)[0]
    found = run_distributed(zero3_gradients, 2, folder, ADAPTER, 1.0, recompute)[0]
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_another_scale_or_other_values_would_fail(folder: Path) -> None:
    """The mutation: alpha / √rank, or adapters that are a hundredth larger."""
    reference = reference_gradients(folder)
    for adapter, scale in ((ADAPTER.model_copy(update={"use_rslora": True}), 1.0), (ADAPTER, 1.01)):
        assert worst(run_distributed(zero3_gradients, 2, folder, adapter, scale)[0], reference) > 1e-3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), tied=False)


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(rank=4, target_modules=["q_proj", "layers.1.mlp.up_proj"], use_rslora=True),
        Adapter(
            rank=4,
            target_modules=["q_proj"],
            modules_to_save=(
                "embed_tokens",
                "lm_head",
                "input_layernorm",
            ),
        ),
    ],
    ids=["some layers, rslora", "whole modules beside"],
)
def test_what_is_trained_may_be_chosen(llama: Path, adapter: Adapter) -> None:
    reference = reference_gradients(llama, adapter)
    assert worst(run_distributed(zero3_gradients, 2, llama, adapter, 1.0)[0], reference) < 1e-5


# ------------------------------------------------------------------------------------------- first values


def whole_values(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from deepspeed.utils import safe_get_full_fp32_param

    engine = engine_of(folder)
    trained = {name: p for name, p in engine.parameters.items() if p.requires_grad}
    assert [group["name"] for group in parameter_groups(engine._engine.module.model, Optim())] == ["matrices"]
    assert {name for part in engine.partitions() for name in (p.name for p in part.parameters)} == trained.keys()
    return {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in trained.items()}


def test_first_values_follow_pefts_rule_and_are_the_same_on_any_number_of_ranks(llama: Path) -> None:
    one, two, three = (run_distributed(whole_values, ranks, llama)[0] for ranks in (1, 2, 3))
    assert len(one) == 2 * 2 * 7
    for name, value in one.items():
        assert np.array_equal(value, two[name])
        assert np.array_equal(value, three[name])
        if ".lora_B." in name:
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < np.abs(value).max() <= bound
    matrices = [value for name, value in one.items() if name.endswith("q_proj.lora_A.weight")]
    assert not np.array_equal(matrices[0], matrices[1])
    assert not torch.equal(first_values("x.lora_A.weight", (3, 4), 0), first_values("x.lora_A.weight", (3, 4), 1))


# ---------------------------------------------------------------------------------------------- bad input


def said_on_rank(folder: Path, adapter: Adapter) -> str:
    try:
        engine_of(folder, adapter)
    except ConfigError as error:
        return str(error)
    return ""


HAVE = "these can: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter(target_modules=["q_proj", "query"]), f"target_modules: the model has no layer query; {HAVE}"),
        (Adapter(target_modules=["lm_head"]), f"the output layer (lm_head) cannot have an adapter; {HAVE}"),
        (Adapter(target_modules=["embed_tokens"]), f"embed_tokens is no linear layer but a Embedding; {HAVE}"),
        (Adapter(modules_to_save=("head",)), "modules_to_save: the model has no module head; it has: down_proj"),
        (Adapter(modules_to_save=("mlp",)), "mlp holds model.layers.0.mlp.gate_proj, which adapter.target_modules nam"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_is_one_line_that_lists_those_that_can(
    llama: Path, adapter: Adapter, message: str
) -> None:
    said = run_distributed(said_on_rank, 2, llama, adapter)
    assert said[0] == said[1]
    assert message in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_linear_means_what_it_means_to_peft(model_type: str, tmp_path: Path) -> None:
    folder = small_model(tmp_path, model_type)
    wrapped = [name for name, module in peft_model(folder).named_modules() if hasattr(module, "lora_A")]
    found = find_targets(AutoModelForCausalLM.from_pretrained(folder), "all-linear")
    assert sorted(found) == sorted(name.removeprefix("base_model.model.") for name in wrapped)
