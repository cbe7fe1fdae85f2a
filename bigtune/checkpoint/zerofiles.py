"""What the files of DeepSpeed's ZeRO-3 say, a rank's at a time: names, shapes, and where the values lie.

    zero_pp_rank_0_mp_rank_00_model_states.pt
      param_shapes             [{"model.embed_tokens.weight": torch.Size, …}, …], in the order of the values
      frozen_param_shapes      {name: torch.Size}
      frozen_param_fragments   {name: this rank's part}
      buffer_names, module     ["…"], {"…": the whole buffer}; in the place of parameters empty tensors
      shared_params            {a further name: the one under which it is kept}, of rank 0 alone
    zero_pp_rank_0_mp_rank_00_optim_states.pt, or bf16_zero_pp_rank_…
      optimizer_state_dict     {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [flat tensor, …], …}

As `DeepSpeedEngine._common_checkpoint_state` and `DeepSpeedZeroOptimizer_Stage3._rigid_state_dict` of 0.19 write them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bigtune.checkpoint.torchfile import TorchFile, is_shape, read
from bigtune.checkpoint.unpickle import Named, RefusedError, inert
from bigtune.errors import CheckpointError
from bigtune.tensorfile import Place

T = TypeVar("T")
Shape = tuple[int, ...]
STATES = "*_states.pt"
NAME = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_(model|optim)_states\.pt")
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""torch's names of the dtypes that trained values may have."""
ANOTHER = "merge another step"
UNIVERSAL = "convert it with DeepSpeed's ds_to_universal.py"


STAGES = ("disabled", "optimizer_states", "gradients", "weights")


def _stage(number: object) -> object:
    """deepspeed.runtime.zero.config.ZeroStageEnum, whose members are `STAGES`, by their numbers."""
    return number


def _stage_by_name(of: object, name: object) -> int:
    """getattr: how Python 3.11.0 to 3.11.3 pickle a member of an enumeration. Of anything else nothing is had."""
    if isinstance(of, Named) and of.make is _stage and name in STAGES:
        return STAGES.index(str(name))
    raise RefusedError("asks for getattr")


MAKERS: dict[str, Callable[..., object]] = {
    "__builtin__.getattr": _stage_by_name,
    "builtins.getattr": _stage_by_name,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": inert,
    "deepspeed.utils.tensor_fragment.fragment_address": inert,
}
"""What DeepSpeed's checkpoints name beside torch's; the last one those of ZeRO 1 and 2."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one step, by rank."""

    models: Mapping[int, Path]
    optimizers: Mapping[int, Path]


@dataclass(frozen=True, slots=True)
class Master:
    """Of one rank's *_optim_states.pt: its flat groups of master values, and of how many ranks it is one."""

    path: Path
    world: int
    groups: tuple[Place, ...]
    sums: str

    @property
    def common(self) -> object:
        """What every rank's has the same."""
        return self.world, [(place.shape, place.dtype) for place in self.groups]


@dataclass(frozen=True, slots=True)
class Model:
    """Of one rank's *_model_states.pt: shapes of trained parameters, in order, and of frozen ones, this rank's parts of
    the latter, whole buffers, further names of parameters, and the dtype that training computed in."""

    path: Path
    steps: int
    trained: Mapping[str, Shape]
    frozen: Mapping[str, Shape]
    fragments: Mapping[str, Place]
    buffers: Mapping[str, Place]
    tied: Mapping[str, str]
    dtype: str
    sums: str

    @property
    def common(self) -> object:
        """What every rank's has the same."""
        return self.steps, list(self.trained.items()), list(self.frozen.items())


def files_of(folder: Path) -> Files:
    """The files of a step.

    Raises:
        CheckpointError: one is not of ZeRO-3 alone or of another save, or what they need lies elsewhere.
    """
    if (folder / "offloaded_tensors").is_dir():
        raise CheckpointError(f"{folder}: its values were on NVMe and are no part of its .pt files; {ANOTHER}")
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in sorted(folder.glob(STATES)):
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            raise CheckpointError(
                f"{path}: ZeRO-3 alone writes no such file; DeepSpeed's own zero_to_fp32.py merges ZeRO 1 and 2, "
                "its ds_to_universal.py pipelines and experts"
            )
        rank, ranks = int(match[1]), found[match[3]]
        if int(match[2]):
            raise CheckpointError(f"{path}: is of model parallelism; {UNIVERSAL}")
        if rank in ranks:
            raise CheckpointError(f"{path}: lies beside {ranks[rank].name}, of another save; remove the older one")
        ranks[rank] = path
    return Files(found["model"], found["optim"])


def refuse_incomplete(folder: Path, files: Files, world: int) -> None:
    """See that every rank's files are there, and no other's.

    Raises:
        CheckpointError: not so.
    """
    for kind, paths in (("model", files.models), ("optim", files.optimizers)):
        missing = next((rank for rank in range(world) if rank not in paths), None)
        if missing is not None:
            raise CheckpointError(
                f"{folder}: rank {missing} of {world:,} has no *_{kind}_states.pt; copy it from the host that wrote it"
            )
        if len(paths) > world:
            raise CheckpointError(
                f"{paths[max(paths)]}: is of another save than the rest, which {world} ranks wrote; "
                f"remove the files of ranks from {world} on, or {ANOTHER}"
            )


def read_master(path: Path) -> Master:
    """Read a *_optim_states.pt.

    Raises:
        CheckpointError: as `torchfile.read`; or it is of another stage, of experts over ranks, or not as described.
    """
    file = read(path, MAKERS)
    state = _take(file, file.tree, "optimizer_state_dict", dict)
    stage = _take(file, state, "zero_stage", int)
    if stage != 3:
        known = stage if stage in (0, 1, 2) else "unknown"
        raise CheckpointError(
            f"{path}: is of ZeRO stage {known}, not 3; DeepSpeed's own zero_to_fp32.py merges 1 and 2"
        )
    if state.get("ds_zero_partition_groups"):
        raise CheckpointError(f"{path}: has experts over ranks; {UNIVERSAL}")
    world, groups = _take(file, state, "partition_count", int), _take(file, state, "fp32_flat_groups", list)
    if not 0 < world < 2**31 or not all(isinstance(place, Place) for place in groups):
        raise _unlike(file, "partition_count and fp32_flat_groups")
    dtypes = {place.dtype for place in groups}
    if len(dtypes) > 1 or not dtypes <= FLOATS.keys():
        raise CheckpointError(f"{path}: has master values of dtypes {', '.join(sorted(dtypes))}; {ANOTHER}")
    return Master(path, world, tuple(groups), file.sums)


def read_model(path: Path) -> Model:
    """Read a *_model_states.pt.

    Raises:
        CheckpointError: as `torchfile.read`; or it is of model parallelism or of experts over ranks, was saved without
            optimizer or frozen parameters, or is not as described.
    """
    file = read(path, MAKERS)
    _refuse_partial(path, file.tree)
    trained: dict[str, Shape] = {}
    for group in _take(file, file.tree, "param_shapes", list):
        trained |= _shapes(file, "param_shapes", group)
    frozen = _shapes(file, "frozen_param_shapes", file.tree.get("frozen_param_shapes", {}))
    fragments = _by_name(file, "frozen_param_fragments", file.tree.get("frozen_param_fragments", {}), Place)
    module, names = _take(file, file.tree, "module", dict), _take(file, file.tree, "buffer_names", list)
    buffers = {name: module.get(name) for name in names if type(name) is str}
    empty = [module[name] for name in (*trained, *frozen) if isinstance(module.get(name), Place)]
    return Model(
        path=path,
        steps=_take(file, file.tree, "global_steps", int),
        trained=trained,
        frozen=frozen,
        fragments=fragments,
        buffers=_by_name(file, "contiguous buffers", buffers, Place),
        tied=_by_name(file, "shared_params", file.tree.get("shared_params"), str),
        dtype=FLOATS.get(empty[0].dtype, "float32") if empty else "float32",
        sums=file.sums,
    )


def _refuse_partial(path: Path, tree: Mapping[Any, Any]) -> None:
    if tree.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{path}: is of model parallelism; {UNIVERSAL}")
    if tree.get("ds_autoep_layers") or tree.get("autoep_layers"):
        raise CheckpointError(f"{path}: has experts over ranks; {UNIVERSAL}")
    if "param_shapes" in tree and tree["param_shapes"] is None:
        raise CheckpointError(f"{path}: was saved without an optimizer, and so without float32 values; {ANOTHER}")
    if "frozen_param_shapes" in tree and tree["frozen_param_shapes"] is None:
        raise CheckpointError(
            f"{path}: was saved without its frozen parameters (exclude_frozen_parameters); "
            "it holds no whole model; save it with them"
        )


def _take(file: TorchFile, tree: Mapping[Any, Any], key: str, kind: type[T]) -> T:
    value = tree.get(key)
    if type(value) is not kind:
        raise _unlike(file, key)
    return value


def _by_name(file: TorchFile, key: str, value: object, kind: type[T]) -> dict[str, T]:
    if type(value) is not dict or not all(type(k) is str and type(v) is kind for k, v in value.items()):
        raise _unlike(file, key)
    return value


def _shapes(file: TorchFile, key: str, value: object) -> dict[str, Shape]:
    shapes: dict[str, Shape] = _by_name(file, key, value, tuple)
    if not all(map(is_shape, shapes.values())):
        raise _unlike(file, key)
    return shapes


def _unlike(file: TorchFile, key: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: has no {key} as DeepSpeed's ZeRO-3 writes them; {ANOTHER}")
