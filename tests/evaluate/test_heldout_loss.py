import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bigtune.evaluate.loss as loss
from bigtune.evaluate.prompts import Item


def random_items(vocabulary: int, count: int = 9) -> list[Item]:
    draw = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=draw))
        return list(map(int, torch.randint(0, vocabulary, (length,), generator=draw)))

    return [Item("", "", ids(40), ids(20)) for _ in range(count)]


def full_logits_loss(model: Any, item: Item) -> float:
    """The plain way: one row, all logits."""
    ids = torch.tensor([[*item.prompt_ids, *item.answer_ids]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(item.prompt_ids) - 1 : -1]
    return float(F.cross_entropy(logits.double(), torch.tensor(item.answer_ids), reduction="sum"))


def test_loss_is_that_of_the_models_own_full_logits(model: Any) -> None:
    exact = copy.deepcopy(model).double()  # in float32 a matrix product depends on the rows beside, on some CPUs
    items = random_items(model.config.vocab_size)
    for value, item in zip(loss.answer_losses(exact, items), items, strict=True):
        assert value / len(item.answer_ids) == pytest.approx(
            full_logits_loss(exact, item) / len(item.answer_ids), abs=1e-6
        )


def test_what_a_model_does_to_its_logits_counts() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
    )
    capped = Gemma2ForCausalLM(config).eval()
    items = random_items(100, count=3)
    for value, item in zip(loss.answer_losses(capped, items), items, strict=True):
        assert value / len(item.answer_ids) == pytest.approx(
            full_logits_loss(capped, item) / len(item.answer_ids), abs=1e-6
        )


def test_batches_of_any_size_give_the_same_losses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(model.config.vocab_size)
    done: list[int] = []
    together = loss.answer_losses(model, items, progress=done.append)
    assert done == [len(items)]
    monkeypatch.setattr(loss, "_TOKENS", 1)
    done.clear()
    assert loss.answer_losses(model, items, progress=done.append) == pytest.approx(together, abs=1e-4)
    assert done == list(range(1, len(items) + 1))
