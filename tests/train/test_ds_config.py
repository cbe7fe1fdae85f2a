"""One owner a setting: what a DeepSpeed JSON may say, and what the run file says instead."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigtune.errors import ConfigError
from bigtune.train.ds_config import OWNED, complete, preset_folder, read_preset
from tests.tiny import tiny_run

# The example of Hugging Face's documentation, which users' files come from, but for the types of the
# optimizer and the schedule: those name what the run file owns.
HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def write(folder: Path, config: Any) -> str:
    path = folder / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", {"type": "AdamW", "params": {"lr": 1e-4}}),
        ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
        ("bf16", {"enabled": True}),
        ("fp16", {"enabled": True, "loss_scale": 0}),
        ("amp", {"enabled": True}),
        ("torch_autocast", {"enabled": True}),
        ("data_types", {"grad_accum_dtype": "bf16"}),
        ("communication_data_type", "bf16"),
        ("gradient_clipping", 1.0),
        ("train_batch_size", 16),
        ("train_micro_batch_size_per_gpu", 2),
        ("gradient_accumulation_steps", 4),
    ],
)
def test_a_key_that_the_run_file_owns_is_refused_with_the_run_files_key(tmp_path: Path, key: str, value: Any) -> None:
    for stage in (2, 3):
        with pytest.raises(
            ConfigError, match=f"'{key}' is owned by the run file; remove it and set {OWNED[key]} there"
        ):
            read_preset(write(tmp_path, {"zero_optimization": {"stage": stage}, key: value}))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("offload_param", {"device": "cpu"}, "offload_param is not supported yet"),
        ("zero_hpz_partition_size", 8, "zero_hpz_partition_size is not supported yet"),
        ("zero_quantized_weights", True, "zero_quantized_weights is not supported yet"),
        ("offload_optimizer", {"device": "nvme"}, "offload_optimizer.device is nvme; use none or cpu"),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "offload_optimizer.ratio is not supported yet"),
        ("offload_optimizer", "cpu", "offload_optimizer is 'cpu'"),
    ],
)  # fmt: skip
def test_partitions_that_checkpoints_do_not_know_are_refused(
    tmp_path: Path, key: str, value: Any, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_preset(write(tmp_path, {"zero_optimization": {"stage": 3, key: value}}))


def test_what_is_switched_off_is_no_reason_to_refuse(tmp_path: Path) -> None:
    off = {
        "offload_param": None,
        "offload_optimizer": None,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
    }
    assert read_preset(write(tmp_path, {"zero_optimization": {"stage": 3, **off}}))["zero_optimization"]["stage"] == 3
    none = {"offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}
    assert read_preset(write(tmp_path, {"zero_optimization": {"stage": 3, **none}}))


def test_no_owned_key_is_left_untested() -> None:
    marks = test_a_key_that_the_run_file_owns_is_refused_with_the_run_files_key.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(OWNED)


def test_the_run_files_keys_that_are_named_exist(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    for owner in OWNED.values():
        section, key = owner.split(".")
        assert hasattr(getattr(run, section), key)


def test_the_json_of_hugging_faces_documentation_is_accepted(tmp_path: Path) -> None:
    """Every "auto" of it is filled or belongs to the run file, and its own choices stay."""
    run = tiny_run(tmp_path, train__micro_batch=3, optim__max_grad_norm=0.5)
    config = complete(read_preset(write(tmp_path, HUGGING_FACE)), run, "bfloat16", hidden_size=100)
    assert "auto" not in json.dumps(config)
    assert "optimizer" not in config
    assert "scheduler" not in config
    assert "fp16" not in config
    assert (
        config["zero_optimization"]
        | {
            "reduce_bucket_size": 10_000,
            "stage3_prefetch_bucket_size": 9_000,
            "stage3_param_persistence_threshold": 1_000,
            "overlap_comm": True,
            "stage3_max_live_parameters": 1e9,
        }
        == config["zero_optimization"]
    )
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}


def test_gradients_are_reduced_and_accumulated_in_float32(tmp_path: Path) -> None:
    for precision in ("bfloat16", "float32"):
        config = complete(read_preset("zero3"), tiny_run(tmp_path), precision, 36)
        assert config["bf16"] == {"enabled": precision == "bfloat16"}
        assert config["data_types"]["grad_accum_dtype"] == "fp32"
        assert config["communication_data_type"] == "fp32"
        assert "train_batch_size" not in config


def test_completing_leaves_the_preset_as_it_was(tmp_path: Path) -> None:
    preset = read_preset(write(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    complete(preset, tiny_run(tmp_path), "float32", 36)
    assert preset == {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}


def test_an_auto_that_bigtune_cannot_fill_is_refused_by_name(tmp_path: Path) -> None:
    preset = read_preset(
        write(tmp_path, {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}, "aio": {"queue_depth": "auto"}})
    )
    with pytest.raises(ConfigError, match=r'"auto" of zero_optimization\.sub_group_size, aio\.queue_depth; give'):
        complete(preset, tiny_run(tmp_path), "float32", 36)


@pytest.mark.parametrize("stage", [0, 1, "auto", None])
def test_another_stage_is_refused(tmp_path: Path, stage: Any) -> None:
    with pytest.raises(ConfigError, match=f"stage is {stage}; bigtune trains with stage 3 or 2"):
        read_preset(write(tmp_path, {"zero_optimization": {"stage": stage}}))


def test_offload_goes_with_stage_3_alone(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match="offload_optimizer with stage 2 is not supported; use zero3_offload"):
        read_preset(write(tmp_path, {"zero_optimization": zero}))
    read_preset(write(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}))


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": None}, {"zero_optimization": True}])
def test_a_json_without_zero_is_refused(tmp_path: Path, zero: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="bigtune trains with stage 3"):
        read_preset(write(tmp_path, zero))


def test_what_is_no_json_object_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json: not readable as JSON: .* line 1"):
        read_preset(write(tmp_path, '{"zero_optimization": '))
    with pytest.raises(ConfigError, match=r"ds\.json: a DeepSpeed configuration is a JSON object"):
        read_preset(write(tmp_path, "[3]"))


def test_a_missing_preset_lists_the_presets() -> None:
    names = ", ".join(sorted(path.stem for path in preset_folder().glob("*.json")))
    assert "zero3" in names
    for name in ("zero4", "none/ds.json"):
        with pytest.raises(ConfigError, match=f"no preset or file '{name}'; presets: {names};"):
            read_preset(name)
