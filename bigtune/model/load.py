"""A pretrained model without its weights, and the rules by which a rank reads its share of them.

    config.json ──▶ skeleton on the meta device ──▶ ZeRO-3 partitions, each filled from its byte range
                                                    (the conversion itself is the engine's)

No rank ever holds the whole model (design, rule 5).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from bigtune.errors import ModelError
from bigtune.model import attention
from bigtune.model.shards import Shards

EXACT = (
    "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "llama", "mistral", "nemotron",
    "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip
"""Model types of which a test holds that packed documents equal each alone, and that the loss head computes what the
model's own logits give. Layers that bypass the attention interface, or count positions themselves, train silently
wrong; hence no other is let in."""


def read_config(folder: Path) -> Any:
    """The configuration of a model that bigtune can train, from a local folder only.

    Raises:
        ModelError: the folder, or a readable config.json in it, is missing, or the model is of another type.
    """
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder.absolute()} is no folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder.absolute()} has no config.json; it must be a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/config.json: {str(error).splitlines()[0]}") from None
    if config.model_type not in EXACT:
        raise ModelError(
            f"{folder}: models of type {config.model_type} are not verified to train exactly yet; "
            f"these are: {', '.join(EXACT)}"
        )
    return config


def skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, with packed attention; its parameters hold no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            read_config(folder), dtype=dtype, attn_implementation=attention.NAME
        )
    model.train()
    return model


def shards_of(model: PreTrainedModel, folder: Path) -> Shards:
    """The model's files, tensors by the names of its parameters: transformers 5 calls some otherwise than files do, as
    GPT-NeoX's output layer.

    Raises:
        ModelError: the files are missing or broken.
    """
    shards = Shards(folder)
    renamings = [each for each in get_model_conversion_mapping(model) if type(each) is WeightRenaming]
    wanted = model.state_dict().keys()
    others = {apply_renamings(name, renamings): name for name in shards.places if name not in wanted}
    shards.rename({name: in_files for name, in_files in others.items() if name in wanted - shards.places.keys()})
    return shards


def check_tensors(model: PreTrainedModel, shards: Shards, grown: Collection[str] = ()) -> None:
    """Every parameter and saved buffer has a tensor of its shape; those that are `grown` may have fewer rows there.

    Raises:
        ModelError: names the tensors that are missing or misshapen.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted |= {name: tuple(buffer.shape) for name, buffer in saved_buffers(model).items()}
    missing = [name for name in wanted if name not in shards.places]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{shards.folder}: the files lack {len(missing)} tensors of the model: {shown}")
    for name, shape in wanted.items():
        found = shards.places[name].shape
        fewer = name in grown and found[0] < shape[0] and found[1:] == shape[1:]
        if found != shape and not fewer:
            raise ModelError(
                f"{shards.folder}: tensor {name} has shape {list(found)}, the config asks for {list(shape)}"
            )


def saved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that a model's files hold (few models have any)."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def materialise_buffers(model: PreTrainedModel, shards: Shards, device: torch.device) -> None:
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
                shards.read(full, 0, real.numel(), real.view(-1))
            else:
                computed = True
            module._buffers[name] = real
        if computed:
            model._init_weights(module)  # transformers' own way to fill them
