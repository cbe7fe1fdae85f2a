"""Tiny real parts for tests: a byte-level tokenizer, Llamas of some thousand parameters, rows of data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtune.config import Run
from bigtune.runfile import resolve

VOCABULARY = 320


def tiny_llama(folder: Path, tied: bool = True, **changes: Any) -> Path:
    """A random Llama of two layers, saved in several safetensors files; odd sizes, so that ranks get padding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY + 1, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 256,
            "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
        }
        | changes
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(config.dtype or torch.float32)
    with torch.no_grad():  # norms of one value only would hide a mix-up
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def tiny_family(
    folder: Path, model_type: str, experts: int = 4, save_original_format: bool = True, **changes: Any
) -> Path:
    """A random model of any type, with experts where it has some; norms are random as in `tiny_llama`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY + 1, "hidden_size": 36, "intermediate_size": 48, "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 6, "max_position_embeddings": 256, "initializer_range": 0.2,
            "num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": 2, "bos_token_id": None,
            "eos_token_id": 0, "pad_token_id": 1,
        }
        | changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_original_format=save_original_format)
    return folder


def byte_level_bpe(corpus: Sequence[str], vocabulary: int, specials: Sequence[str]) -> Any:
    """A byte-level BPE trained on a few lines; any text can be encoded, the special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return core


def tiny_tokenizer(folder: Path) -> Path:
    """A tokenizer with <|end|> (0) to end a text and <|pad|> (1), and no chat template."""
    from transformers import PreTrainedTokenizerFast

    lines = ["### Instruction:\nSay the word.\n\n### Response:\nword"] * 8
    core = byte_level_bpe(lines, VOCABULARY, ["<|end|>", "<|pad|>"])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(folder)
    return folder


def tiny_model(folder: Path, **changes: Any) -> Path:
    """A model folder as a user has it: weights, config and tokenizer."""
    tiny_tokenizer(folder)
    return tiny_llama(folder, **changes)


def write_rows(path: Path, count: int = 40) -> Path:
    """Alpaca rows of unequal lengths."""
    words = ["red", "blue", "green", "house", "river", "a long answer of several words"]
    rows = [
        {"instruction": f"Say the word number {i}.", "input": words[i % 6] * (i % 4), "output": words[(i * 7) % 6]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_run(folder: Path, **changes: Any) -> Run:
    """A run over `write_rows` and `tiny_model` in one folder. Changes are `section__key=value`."""
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}], "sequence_length": 96},
        "optim": {"name": "adamw_8bit", "learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 2},
        "train": {"steps": 6, "global_batch": 4, "precision": "float32"},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return resolve(tree)
