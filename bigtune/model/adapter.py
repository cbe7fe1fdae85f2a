"""LoRA (https://arxiv.org/abs/2106.09685) through peft: which layers get adapters, and what a checkpoint knows of them.

    layer(x) + scale · B (A x)        A [rank, inputs], B [outputs, rank]; both trained, the layer frozen

peft puts its modules into the model itself, without a wrapper around it. Names are those of peft's files: the base
layer keeps its name, and adapters are `….q_proj.lora_A.weight` and `….q_proj.lora_B.weight`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bigtune.config import Adapter
from bigtune.errors import ConfigError
from bigtune.model.folds import Adapted, Fold

_WRAPPERS = re.compile(r"\.base_layer(?=\.)|(?<=\.lora_[AB])\.default(?=\.)")


def plain_name(name: str) -> str:
    """The name of a parameter as files have it, without what peft's modules put in."""
    return _WRAPPERS.sub("", name)


def add_adapters(model: PreTrainedModel, adapter: Adapter, train_embeddings: bool) -> Adapted:
    """Freeze a model on the meta device, and put adapters on the meta device beside its layers.

    Args:
        train_embeddings: train the embeddings of tokens and the output layer whole, since they have new rows.

    Raises:
        ConfigError: a layer that is named does not exist, or cannot have an adapter.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model  # takes seconds to import

    targets = find_targets(model, adapter.target_modules)
    kinds = {type(model.get_submodule(name)) for name in targets}
    saved = _whole_modules(model, adapter.modules_to_save, targets)
    embeddings = _embeddings(model) if train_embeddings else []
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_rslora=adapter.use_rslora,
        fan_in_fan_out=Conv1D in kinds,
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for name in {*saved, *embeddings}:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad = True
    frozen = {plain_name(name): tuple(p.shape) for name, p in model.named_parameters() if not p.requires_grad}
    # Embeddings go into an adapter's file as they are, tied or not; peft wraps other modules, and must know of them.
    wrapped = [name for name in saved if name not in _embeddings(model)]
    named = adapter.target_modules
    kept = ("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "bias", "peft_version")
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        **{key: value for key, value in config.to_dict().items() if key in kept},
        "target_modules": sorted({_leaf(name) for name in targets}) if named == "all-linear" else list(named),
        "modules_to_save": wrapped or None,
    }
    return Adapted(_folds(model, targets), frozen, told)


def find_targets(model: PreTrainedModel, asked: Any) -> list[str]:
    """The linear layers that are meant: by whole names, or the end of them; `all-linear` are all but the output layer.

    Raises:
        ConfigError: there is none of a name.
    """
    head = model.get_output_embeddings()
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    if asked == "all-linear":
        return layers
    found = []
    for word in asked:
        matching = [name for name in layers if _means(word, name)]
        if not matching:
            raise _no_target(model, word, layers)
        found += matching
    return sorted(set(found))


def _no_target(model: PreTrainedModel, word: str, layers: Sequence[str]) -> ConfigError:
    others = [module for name, module in model.named_modules() if _means(word, name)]
    have = f"these can: {_leaves(layers)}"
    if model.get_output_embeddings() in others:
        return ConfigError(
            f"adapter.target_modules: the output layer ({word}) cannot have an adapter; {have}; "
            f"adapter.modules_to_save: [{word}] trains it whole"
        )
    if others:
        kind = type(others[0]).__name__
        return ConfigError(f"adapter.target_modules: {word} is no linear layer but a {kind}; {have}")
    return ConfigError(f"adapter.target_modules: the model has no layer {word}; {have}")


def _whole_modules(model: PreTrainedModel, asked: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Names of the modules that are trained whole."""
    having = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    found = []
    for word in asked:
        matching = [name for name in having if _means(word, name)]
        if not matching:
            raise ConfigError(f"adapter.modules_to_save: the model has no module {word}; it has: {_leaves(having)}")
        for name in matching:
            both = [target for target in targets if f"{target}.".startswith(f"{name}.")]
            if both:
                raise ConfigError(
                    f"adapter.modules_to_save: {word} holds {both[0]}, which adapter.target_modules names too; "
                    "name it in one of them"
                )
        found += matching
    return sorted(set(found))


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the modules of token embeddings and of the output layer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if module in ends]


def _folds(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, Fold]:
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    return {
        f"{name}.weight": Fold(
            f"{name}.lora_A.weight", f"{name}.lora_B.weight", layer.scaling["default"], layer.fan_in_fan_out
        )
        for name, layer in layers.items()
    }


def _means(word: str, name: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({leaf for leaf in map(_leaf, names) if not leaf.isdigit()}))
