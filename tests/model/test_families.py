"""Every model type that bigtune lets in: packed documents equal each alone, and the head equals the model's own."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from bigtune.errors import ModelError
from bigtune.model import attention
from bigtune.model.head import replace_head
from bigtune.model.load import EXACT, read_config, saved_buffers

VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS, OFFSETS = (7, 1, 12, 5), (0, 7, 8, 20, 25)


def packed_and_alone(model_type: str) -> tuple[Any, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """A random model with packed attention, its packed logits, each document's own, and the packed inputs."""
    config = AutoConfig.for_model(model_type, **SMALL)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of one value only would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(3, VOCABULARY, (1, OFFSETS[-1])),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "use_cache": False,
        "document_offsets": list(OFFSETS),
    }
    with torch.no_grad():
        packed_SV = model(**inputs).logits[0]
        alone = [plain(inputs["input_ids"][:, start:end]).logits[0] for start, end in pairwise(OFFSETS)]
    return model, packed_SV, torch.cat(alone), inputs


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("model_type", EXACT)
def test_packed_documents_and_the_loss_head_are_exact(model_type: str) -> None:
    model, packed_SV, alone_SV, inputs = packed_and_alone(model_type)
    assert error(packed_SV, alone_SV) < 1e-5
    assert not saved_buffers(model)  # merge would have to carry them
    predict_at_T = torch.tensor([3, 4, 5, 10, 22])
    targets_T = inputs["input_ids"][0, predict_at_T + 1]
    weights_T = torch.tensor([1.0, 0.5, 1.0, 2.0, 0.25])
    with torch.no_grad():
        head = replace_head(model)
        loss = head(model.base_model(**inputs)[0][0][predict_at_T], targets_T, weights_T)
        wanted = (cross_entropy(alone_SV[predict_at_T], targets_T, reduction="none") * weights_T).sum()
    assert error(loss, wanted) < 1e-5


def test_a_family_that_counts_positions_itself_would_be_seen() -> None:
    """The mutation: OPT is let through by transformers, and would train silently wrong."""
    _, packed_SV, alone_SV, _ = packed_and_alone("opt")
    assert error(packed_SV, alone_SV) > 1e-2


@pytest.mark.parametrize("model_type", ["opt", "bloom", "lfm2", "qwen3_next", "bert"])
def test_another_type_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"models of type {model_type} are not verified to train exactly yet"):
        read_config(tmp_path)
