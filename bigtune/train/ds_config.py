"""The DeepSpeed configuration of a run: a preset, plus what the run file owns.

One owner a setting (design, rule 6): a preset that fixes the optimizer, schedule, precision, batch or
clipping is refused with the run file's key to use. Hugging Face's "auto" values are filled where bigtune
knows them and refused by name elsewhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtune.config import Run
from bigtune.errors import ConfigError

OWNED = {
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "gradient_clipping": "optim.max_grad_norm",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
}


NOT_YET: dict[str, Any] = {  # with the value that turns it off
    "offload_param": {"device": "none"},
    "cpu_offload": False,
    "cpu_offload_params": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "mics_shard_size": -1,
}


def preset_folder() -> Path:
    """ds_configs/, beside the package in a checkout and inside it when installed."""
    package = Path(__file__).parent.parent
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def read_preset(name: str) -> dict[str, Any]:
    """A preset by name, or a DeepSpeed JSON file by path, without what bigtune owns.

    Raises:
        ConfigError: no such preset or file, broken JSON, a key that the run file owns, or neither ZeRO-3 nor 2.
    """
    path = Path(name) if name.endswith(".json") else preset_folder() / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(preset.stem for preset in preset_folder().glob("*.json")))
        raise ConfigError(f"deepspeed: no preset or file '{name}'; presets: {known}; or give a path ending in .json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object")
    for key, owner in OWNED.items():
        if key in config and not _all_auto(config[key]):
            raise ConfigError(f"{path}: '{key}' is owned by the run file; remove it and set {owner} there")
        config.pop(key, None)
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or stage not in (2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage}; bigtune trains with stage 3 or 2")
    _refuse_other_partitions(path, zero)
    return config


def _refuse_other_partitions(path: Path, zero: dict[str, Any]) -> None:
    """Refuse what puts partitions or states where bigtune's loading and checkpoints do not look for them."""
    for key, off in NOT_YET.items():
        if zero.get(key) not in (None, off):
            raise ConfigError(f"{path}: zero_optimization.{key} is not supported yet; remove it")
    offload = zero.get("offload_optimizer")
    if offload is None:
        zero.pop("offload_optimizer", None)
        return
    if not isinstance(offload, dict):
        raise ConfigError(f"{path}: zero_optimization.offload_optimizer is {offload!r}; it is an object with a device")
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        raise ConfigError(f"{path}: zero_optimization.offload_optimizer.device is {device}; use none or cpu")
    if device == "cpu" and zero["stage"] == 2:
        raise ConfigError(
            f"{path}: zero_optimization.offload_optimizer with stage 2 is not supported; use zero3_offload"
        )
    if offload.get("ratio", 1) != 1:
        raise ConfigError(f"{path}: zero_optimization.offload_optimizer.ratio is not supported yet; remove it")


def complete(preset: dict[str, Any], run: Run, precision: str, hidden_size: int) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets.

    Accumulation stays 1: the engine marks the last micro-step of a global batch itself, since their number
    depends on the ranks. Gradients are reduced and accumulated in float32.
    """
    config = json.loads(json.dumps(preset))
    zero = config["zero_optimization"]
    sizes = {  # as transformers' DeepSpeed integration fills them
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = value
    unknown = [path for path, value in _leaves(config) if value == "auto"]
    if unknown:
        raise ConfigError(f'deepspeed: bigtune cannot fill "auto" of {", ".join(unknown)}; give a value')
    return {
        **config,
        "train_micro_batch_size_per_gpu": run.train.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.max_grad_norm,
        "bf16": {"enabled": precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,  # DeepSpeed's own progress lines; metrics.jsonl has them
    }


def _all_auto(value: Any) -> bool:
    """Whether a section fixes nothing: it is switched off or to "auto", or every leaf is "auto"."""
    if isinstance(value, dict) and value.get("enabled") in ("auto", False):
        return True
    return all(leaf == "auto" for _, leaf in _leaves(value))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
