"""A pretrained model without its weights, and the rules by which a rank reads its share of them.

    config.json ──▶ skeleton on the meta device ──▶ ZeRO-3 partitions, each filled from its byte range
                                                    (the conversion itself is the engine's)

No rank ever holds the whole model (design, rule 5).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bigtune.errors import ModelError
from bigtune.model import attention
from bigtune.model.adapter import plain_name
from bigtune.model.weights import Weights, saved_buffers

EXACT = (
    "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""Model types of which a test holds that packed documents equal each alone, and that the loss head computes what the
model's own logits give. Layers that bypass the attention interface, or count positions themselves, would train
silently wrong; hence every other type is probed before a run (`bigtune.train.probe`)."""


def read_config(folder: Path, trusted: bool = False) -> Any:
    """The configuration of a model that bigtune can train, from a local folder only.

    Args:
        trusted: whether code of the folder may run, where it has some for a type that transformers does not know.

    Raises:
        ModelError: the folder, or a readable config.json in it, is missing, or the model is no causal language model.
    """
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder.absolute()} is no folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder.absolute()} has no config.json; it must be a Hugging Face model")
    try:
        if not trusted and _needs_code(folder):
            raise ModelError(
                f"{folder}: its model is Python code beside it (auto_map in config.json), which is not run; if you "
                "trust whoever wrote it, set model.trust_remote_code: true"
            )
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/config.json: {str(error).splitlines()[0]}") from None
    own = trusted and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own:
        raise ModelError(f"{folder}: models of type {config.model_type} predict no next token; give a decoder")
    if config.get_text_config() is not config:
        raise ModelError(
            f"{folder}: a {config.model_type} model has parts for more than text, which bigtune does not train yet; "
            "save its language model alone, and give that"
        )
    return config


def _needs_code(folder: Path) -> bool:
    """Whether transformers does not know the type of a model, and the folder has code for it."""
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "auto_map" in tree and tree.get("model_type") not in CONFIG_MAPPING_NAMES


def skeleton(folder: Path, dtype: torch.dtype, trusted: bool = False) -> PreTrainedModel:
    """The model on the meta device, with packed attention where it takes one; its parameters hold no memory.

    Args:
        trusted: as `read_config` takes it.
    """

    def built(attention_name: str) -> PreTrainedModel:
        config = read_config(folder, trusted)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention_name, trust_remote_code=trusted
            )
        return cast(PreTrainedModel, model)

    try:
        model = built(attention.NAME)
    except KeyError:  # a family that knows its own kinds of attention alone
        model = built("eager")
    return model.train()


def materialise_buffers(model: PreTrainedModel, weights: Weights, device: torch.device) -> None:
    """Give every buffer memory and its value: from the files, or as the model itself computes it.

    Call it before the parameters are partitioned: transformers initialises a module's buffers together with
    its parameters, which costs nothing on the meta device.
    """
    saved = saved_buffers(model)
    for module_name, module in model.named_modules():
        computed = False
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{module_name}.{name}" if module_name else name
            real = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            if full in saved:
                weights.read(full, 0, real.numel(), real.view(-1))
            else:
                computed = True
            module._buffers[name] = real
        if computed:
            model._init_weights(module)  # transformers' own way to fill them


def replace_parameters(
    model: PreTrainedModel, new: Callable[[str, nn.Parameter], nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Put another parameter in place of each, in every module that shares it.

    Args:
        new: makes it, from its Hugging Face name and the one that stands there, whose attributes it keeps.

    Returns:
        The new ones by these names.
    """
    made, by_old = dict[str, nn.Parameter](), dict[int, nn.Parameter]()
    for wrapped, old in model.named_parameters():
        name = plain_name(wrapped)
        made[name] = by_old[id(old)] = new(name, old)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = by_old[id(parameter)]
    return made
