"""What the files of DeepSpeed's ZeRO-3 may say: checkpoints written by hand that are whole, and such as are not."""

import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtune.checkpoint.deepspeed import find, of_deepspeed
from bigtune.checkpoint.unpickle import RefusedError, load
from bigtune.checkpoint.zerofiles import MAKERS
from bigtune.errors import CheckpointError
from tests.checkpoint.test_deepspeed import as_deepspeed_reads, assembled, differing

Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""What is done to a *_model_states.pt and to the optimizer's state in a *_optim_states.pt before they are written."""


def written(folder: Path, ranks: int = 2, change: Change | None = None) -> Path:
    """A checkpoint as DeepSpeed would write it, of a matrix of 3 × 5 and a frozen vector of 4."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    step = folder / "global_step7"
    step.mkdir(parents=True)
    for rank in range(ranks):
        length = -(-15 // ranks)
        flat = torch.arange(15.0).repeat(2)[rank * length : (rank + 1) * length]
        model: dict[str, Any] = {
            "module": OrderedDict(matrix=torch.empty(0), vector=torch.empty(0), buffer=torch.arange(6).view(2, 3)),
            "buffer_names": ["buffer"],
            "param_shapes": [OrderedDict(matrix=torch.Size([3, 5]))],
            "frozen_param_shapes": OrderedDict(vector=torch.Size([4])),
            "frozen_param_fragments": OrderedDict(
                vector=torch.arange(4.0)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
            ),
            "shared_params": {},
            "global_steps": 7,
            "mp_world_size": 1,
        }
        optimizer: dict[str, Any] = {
            "zero_stage": ZeroStageEnum.weights, "partition_count": ranks, "fp32_flat_groups": [flat]
        }  # fmt: skip
        if change:
            change(model, optimizer)
        torch.save(model, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step7")
    return step


def refused(step: Path) -> str:
    """The one line that says why a checkpoint is not read."""
    with pytest.raises(CheckpointError) as error:
        of_deepspeed(step)
    message = str(error.value)
    assert "\n" not in message and str(step) in message and ";" in message
    return message.removeprefix(str(step)).strip("/: ")


def test_what_is_written_by_hand_is_read(tmp_path: Path) -> None:
    source = of_deepspeed(written(tmp_path, ranks=2))
    assert differing(assembled(source), as_deepspeed_reads(tmp_path)) == []
    assert assembled(source)["matrix"].tolist() == torch.arange(15.0).view(3, 5).tolist()
    assert assembled(source)["vector"].tolist() == [0, 1, 2, 3]
    assert source.model is None
    (tmp_path / "config.json").write_text("{}")
    assert of_deepspeed(tmp_path / "global_step7").model == tmp_path


def test_a_wrapper_that_all_names_have_is_none_of_them(tmp_path: Path) -> None:
    def wrap(buffer: str, model: dict[str, Any], _: dict[str, Any]) -> None:
        for key in ("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "module"):
            for names in model[key] if key == "param_shapes" else [model[key]]:
                for name in list(names):
                    names[f"module.{name}" if name != "buffer" else buffer] = names.pop(name)
        model["buffer_names"], model["shared_params"] = [buffer], {"module.head": "module.matrix"}

    source = of_deepspeed(written(tmp_path / "all", change=partial(wrap, "module.buffer")))
    assert {name: tensor.name for name, tensor in source.tensors.items()} == {"vector": "vector", "matrix": "matrix"}
    assert set(source.carried) == {"buffer"} and source.tied == {"head": "matrix"}
    source = of_deepspeed(written(tmp_path / "some", change=partial(wrap, "other")))
    assert set(source.tensors) == {"module.vector", "module.matrix"} and set(source.carried) == {"other"}


def having(key: str, value: object = None, optimizer: bool = False) -> Change:
    return lambda model, other: (other if optimizer else model).update({key: value})


WRONG: dict[str, tuple[Change, str]] = {
    "stage": (having("zero_stage", 2, True), "is of ZeRO stage 2, not 3; DeepSpeed's own zero_to_fp32.py merges"),
    "more ranks": (having("partition_count", 3, True), "rank 2 of 3 has no *_model_states.pt; copy it from the host"),
    "endless ranks": (having("partition_count", 2**30, True), "rank 2 of 1,073,741,824 has no *_model_states.pt"),
    "fewer ranks": (having("partition_count", 1, True), "is of another save than the rest, which 1 ranks wrote"),
    "no count": (having("partition_count", "2", True), "has no partition_count as DeepSpeed's ZeRO-3 writes them"),
    "no values": (having("fp32_flat_groups", [], True), "has 0 master values where the shapes in"),
    "other values": (having("fp32_flat_groups", [torch.arange(8)], True), "has master values of dtypes I64"),
    "not flat": (having("fp32_flat_groups", [torch.ones(8, 2)[:, 0]], True), "has no partition_count and fp32_flat_"),
    "experts": (having("ds_zero_partition_groups", [{}], True), "has experts over ranks; convert it with DeepSpeed's"),
    "model parallel": (having("mp_world_size", 2), "is of model parallelism; convert it with DeepSpeed's ds_to_univ"),
    "more experts": (having("ds_autoep_layers", [{}]), "has experts over ranks; convert it"),
    "no optimizer": (having("param_shapes"), "was saved without an optimizer, and so without float32 values"),
    "no frozen": (having("frozen_param_shapes"), "was saved without its frozen parameters (exclude_frozen_param"),
    "frozen parts": (having("frozen_param_fragments", {}), "lacks its part of frozen parameter vector"),
    "shapes": (having("param_shapes", [{"matrix": torch.Size([3, 6])}]), "has 8 master values where the shapes in"),
    "large shapes": (having("param_shapes", [{"a": (2**40, 2**40)}]), "has no param_shapes as DeepSpeed's ZeRO-3"),
    "strange shapes": (having("param_shapes", [{"a": (-1, "x")}]), "has no param_shapes as DeepSpeed's ZeRO-3"),
    "strange names": (having("param_shapes", [{3: (2,)}]), "has no param_shapes as DeepSpeed's ZeRO-3"),
    "no buffer": (having("buffer_names", ["nowhere"]), "has no contiguous buffers as DeepSpeed's ZeRO-3 writes them"),
    "adapters": (having("param_shapes", [{"base_model.model.a.lora_A": (3, 5)}]), "holds adapters of peft (base_mod"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_whole_zero_3_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    assert message in refused(written(tmp_path, change=change))


def test_files_that_are_missing_or_of_another_save(tmp_path: Path) -> None:
    step = written(tmp_path)
    model, optimizer = (step / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim"))
    aside = optimizer.rename(tmp_path / "aside")
    assert refused(step).startswith("rank 1 of 2 has no *_optim_states.pt; copy it from the host that wrote it")
    shutil.copy(aside, step / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    assert "is of model parallelism" in refused(step)
    (step / "zero_pp_rank_1_mp_rank_01_optim_states.pt").rename(step / f"bf16_{optimizer.name}")
    of_deepspeed(step)
    shutil.copy(aside, optimizer)
    assert "lies beside bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt, of another save; remove the" in refused(step)
    (step / f"bf16_{optimizer.name}").unlink()
    changed = torch.load(model) | {"global_steps": 8}
    torch.save(changed, model)
    assert "is of another save than zero_pp_rank_0_mp_rank_00_model_states.pt; copy both from one save" in refused(step)
    for path in step.glob("*_optim_states.pt"):
        path.unlink()
    assert refused(step).startswith("no *_optim_states.pt, which have the float32 values; copy them from where")
    (step / "mp_rank_00_model_states.pt").touch()
    assert "ZeRO-3 alone writes no such file; DeepSpeed's own zero_to_fp32.py merges ZeRO 1 and 2" in refused(step)
    (step / "offloaded_tensors").mkdir()
    assert "its values were on NVMe and are no part of its .pt files" in refused(step)


def test_what_a_path_means(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    (tmp_path / "latest").write_text("step-20\n")  # bigtune's own
    assert find(tmp_path) is None
    step = written(tmp_path)
    assert find(tmp_path) == step == find(step)
    (tmp_path / "latest").unlink()
    assert find(tmp_path) == step
    shutil.copytree(step, tmp_path / "global_step9")
    with pytest.raises(CheckpointError, match="several checkpoints of DeepSpeed's; give one of global_step7, global_s"):
        find(tmp_path)
    (tmp_path / "latest").write_text("global_step8\n\x1b[31m")
    with pytest.raises(CheckpointError, match=r"names 'global_step8\\n\\x1b\[31m', which has no \*_states.pt; give"):
        find(tmp_path)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bigtune.checkpoint.deepspeed import of_deepspeed\n"
        "of_deepspeed(Path(sys.argv[1])); sys.exit(int(not {'torch', 'deepspeed'}.isdisjoint(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(written(tmp_path))], check=True)


class Asked:
    """Something that a pickle takes an attribute of."""

    def __init__(self, of: object, name: str) -> None:
        self.asked = (of, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_stage_is_read_as_early_python_3_11_writes_it_and_no_other_attribute(protocol: int) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    def read(of: object, name: str) -> object:
        return load(pickle.dumps(Asked(of, name), protocol), MAKERS, lambda _: None)

    for stage in ZeroStageEnum:
        if stage.name != "max_stage":
            assert read(ZeroStageEnum, stage.name) == stage.value
    for of, name in (
        (ZeroStageEnum, "__class__"),
        (ZeroStageEnum, "mro"),
        (LossScaler, "weights"),
        ("text", "weights"),
    ):
        with pytest.raises(RefusedError, match="asks for getattr"):
            read(of, name)
