"""What decays and what has 8-bit states belongs to a parameter's kind, never to its size."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bigtune.config import Optim
from bigtune.model.head import replace_head
from bigtune.train.optim import build_optimizer, export_state, import_state, parameter_groups

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRIX, NORM, BIAS = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
Name = Literal["adamw", "adamw_8bit", "lion_8bit", "sgd", "adam"]
NAMES: tuple[Name, ...] = get_args(Name)
EIGHT_BIT: tuple[Name, ...] = ("adamw_8bit", "lion_8bit")


def llama(tied: bool) -> Any:
    """With biases; its smallest matrix has 72 elements, less than any 8-bit optimizer's own threshold."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, attention_bias=True, tie_word_embeddings=tied, pad_token_id=None,
        )
    )  # fmt: skip


def names_by_group(model: Any, optim: Optim) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, optim)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prepare", [lambda model: None, replace_head], ids=["plain", "loss head"])
def test_every_parameter_is_in_the_group_of_its_kind_once(tied: bool, prepare: Callable[[Any], Any]) -> None:
    model = llama(tied)
    prepare(model)
    groups = parameter_groups(model, Optim())
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    names = names_by_group(model, Optim())
    assert list(names) == ["matrices", "embeddings", "vectors"]
    assert names["embeddings"] == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    assert MATRIX in names["matrices"]
    assert {NORM, BIAS} <= names["vectors"]
    assert all(p.ndim == 1 for group in groups if group["name"] == "vectors" for p in group["params"])


def test_learned_positions_are_embeddings() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=12, n_layer=1, n_head=2, n_positions=16))
    groups = names_by_group(model, Optim())
    assert groups["embeddings"] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert "transformer.h.0.attn.c_attn.weight" in groups["matrices"]


def test_frozen_parameters_and_groups_without_any_are_left_out() -> None:
    model = llama(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == MATRIX
    assert names_by_group(model, Optim()) == {"matrices": {MATRIX}}


def stepped(name: Name, steps: int = 1) -> tuple[Any, torch.optim.Optimizer, Optim]:
    model, optim = llama(tied=False), Optim(name=name, learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    return model, optimizer, optim


def set_gradients(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion_8bit", "sgd"])
def test_only_matrices_decay(name: Name) -> None:
    """With a gradient of zero, decay is all that a step does; in sgd's first step the coupled one does the same."""
    model, optim = llama(tied=False), Optim(name=name, learning_rate=0.1, weight_decay=0.5)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrices = names_by_group(model, optim)["matrices"]
    for key, parameter in model.named_parameters():
        wanted = before[key] * 0.95 if key in matrices else before[key]
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bits_are_for_matrices_of_any_size_and_for_nothing_else(name: Name) -> None:
    model, optimizer, optim = stepped(name)
    matrices = names_by_group(model, optim)["matrices"]
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        wanted = torch.uint8 if key in matrices else torch.float32
        kinds = ("state1", "state2") if name == "adamw_8bit" else ("state1",)
        assert {kind for kind in state if kind.startswith("state")} == set(kinds)
        assert {state[kind].dtype for kind in kinds} == {wanted}, key


TORCHS: dict[Name, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8),
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.95), eps=1e-8),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("name", TORCHS)
def test_32_bit_optimizers_are_torchs(name: Name) -> None:
    """The run file's numbers arrive."""
    model, _, optim = stepped(name, steps=3)
    reference = llama(tied=False)
    decayed = names_by_group(reference, optim)["matrices"]
    groups = [
        {"params": [p for n, p in reference.named_parameters() if (n in decayed) == flag], "weight_decay": decay}
        for flag, decay in ((True, 0.5), (False, 0.0))
    ]
    optimizer = TORCHS[name](groups, lr=0.1)
    for step in range(3):
        set_gradients(reference, step)
        optimizer.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_lion_moves_by_the_sign_of_its_mixed_moment_and_decays_apart() -> None:
    """Chen et al., https://arxiv.org/abs/2302.06675, algorithm 2; on the head, whose state has 32 bits."""
    model, _, optim = stepped("lion_8bit", steps=3)
    reference = llama(tied=False)
    weight, moment = reference.get_parameter(HEAD).detach(), torch.zeros(30, 12)
    for step in range(3):
        set_gradients(reference, step)
        gradient = reference.get_parameter(HEAD).grad
        weight -= optim.learning_rate * torch.sign(0.9 * moment + 0.1 * gradient)
        moment = 0.99 * moment + 0.01 * gradient
    torch.testing.assert_close(model.get_parameter(HEAD).detach(), weight, rtol=1e-5, atol=1e-6)


def flat_step(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], pieces: int) -> torch.Tensor:
    """The values after three steps of 2,048 elements that lie in so many flat partitions."""
    torch.manual_seed(0)
    values = torch.randn(2048)
    partitions = [torch.nn.Parameter(piece.clone()) for piece in values.chunk(pieces)]
    optimizer = make(partitions)
    for _ in range(3):
        for partition, gradient in zip(partitions, torch.randn(2048).chunk(pieces), strict=True):
            partition.grad = gradient.clone()
        optimizer.step()
    return torch.cat([partition.detach() for partition in partitions])


@pytest.mark.parametrize("name", NAMES)
def test_an_update_does_not_depend_on_where_partitions_end(name: Name) -> None:
    """Hence not on the number of ranks; in 8 bits, where the ends fall between blocks of 256."""

    def make(partitions: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        group = {"params": partitions, "optim_bits": 8 if name in EIGHT_BIT else 32, "weight_decay": 0.1}
        return build_optimizer([group], Optim(name=name, learning_rate=0.1))

    torch.testing.assert_close(flat_step(make, 4), flat_step(make, 1), rtol=1e-6, atol=1e-7)


def test_adafactor_on_flat_partitions_would_fail() -> None:
    """The mutation, and why it is refused: it clips by the root mean square of what it takes for the matrix."""
    one, four = (flat_step(lambda each: torch.optim.Adafactor(each, lr=0.1), pieces) for pieces in (1, 4))
    assert (one - four).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_was_exported_goes_on_to_the_last_bit(name: Name) -> None:
    model, optimizer, optim = stepped(name, steps=3)
    other = copy.deepcopy(model)
    fresh = build_optimizer(parameter_groups(other, optim), optim)
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        tensors, scalars = export_state(optimizer.state[old])
        assert scalars == ({} if name == "sgd" else {"step": 3.0})
        import_state(fresh, new, {kind: tensor.clone() for kind, tensor in tensors.items()}, scalars)
    for seed in (5, 6):
        for instance, stepper in ((model, optimizer), (other, fresh)):
            set_gradients(instance, seed)
            stepper.step()
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(old, new)
        assert_same_state(optimizer.state[old], fresh.state[new])


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("adamw_8bit", {"state1", "state2", "absmax1", "absmax2"}), ("lion_8bit", {"state1", "absmax1"})],
)
def test_code_books_are_not_exported(name: Name, kinds: set[str]) -> None:
    model, optimizer, _ = stepped(name)
    tensors, _ = export_state(optimizer.state[dict(model.named_parameters())[MATRIX]])
    assert set(tensors) == kinds
