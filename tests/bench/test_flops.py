"""Operations: counted by torch on one side, by formula on the other."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bigtune.bench.flops import Shape, exact_flops, palm_flops, shape_of, utilization
from tests.tiny import VOCABULARY, tiny_family, tiny_llama

SHAPE = Shape(parameters=1000, body=700, head=200, layers=3, width=8, hidden_size=8, intermediate_size=16)


def test_the_formula_of_palm() -> None:
    assert palm_flops(SHAPE, 10, sequence_length=64) == 10 * (6 * 1000 + 12 * 3 * 8 * 64)


def test_what_is_computed_here() -> None:
    """The head at supervised tokens alone, attention within documents; a frozen weight has no gradient."""
    attention = 6 * 3 * 8 * 58
    assert exact_flops(SHAPE, 10, 4, squares=58) == 6 * (700 * 10 + 200 * 4) + attention
    assert exact_flops(SHAPE, 10, 4, squares=58, frozen=True) == 4 * (700 * 10 + 200 * 4) + attention


def test_shares_of_the_roofs_that_are_known() -> None:
    assert utilization({"exact": 2.0}, {"measured": 4.0, "datasheet": None}) == {"exact": {"measured": 0.5}}


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_of_a_model(tmp_path: Path, tied: bool) -> None:
    shape = shape_of(tiny_llama(tmp_path, tied=tied))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    head = (VOCABULARY + 1) * 36
    assert shape.parameters == model.num_parameters()
    assert shape.head == head
    assert shape.body == model.num_parameters() - (1 if tied else 2) * head
    assert (shape.layers, shape.width, shape.intermediate_size) == (2, 36, 50)


def test_torch_counts_as_many_operations(tmp_path: Path) -> None:
    """One document, all of it supervised. torch counts the whole square of attention, where a mask leaves half."""
    shape = shape_of(tiny_llama(tmp_path, tied=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    n = 64
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(n)[None] + 2, use_cache=False).logits.sum().backward()
    norms = (2 * 2 + 1) * 36
    attention = 6 * shape.layers * shape.width * n * n
    expected = exact_flops(shape, n, n, squares=n * n) + attention - 6 * norms * n
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


def test_of_experts_those_count_that_a_token_is_sent_to(tmp_path: Path) -> None:
    two, eight = (
        shape_of(tiny_family(tmp_path / f"{count}", "qwen2_moe", experts=count)).parameters for count in (2, 8)
    )
    router = 2 * 6 * 36  # a row an expert and layer; two experts of either are chosen
    assert eight - two == router
