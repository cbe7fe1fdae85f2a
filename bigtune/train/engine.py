"""The one place that knows DeepSpeed: partitions filled from shards, exact micro-steps, the optimizer step.

DeepSpeed's internals are named here and nowhere else: `Partition` is what the rest of bigtune sees of them.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.checkpoint.layout import Parameter
from bigtune.config import Adapter, Loss, Optim
from bigtune.data.collate import MicroBatch
from bigtune.dist import World, device
from bigtune.model.adapter import add_adapters, plain_name
from bigtune.model.attention import documents
from bigtune.model.head import Losses, full_logits_loss, replace_head
from bigtune.model.initial import Initial, vocabulary_parameters
from bigtune.model.load import check_tensors, materialise_buffers, shards_of, skeleton
from bigtune.model.vocabulary import Vocabulary
from bigtune.train.optim import build_optimizer, parameter_groups


def connect(world: World) -> None:
    """Join the other workers: NCCL on CUDA, gloo elsewhere."""
    import deepspeed

    # The shared-memory op would be compiled here, though only inference collectives use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )


class Objective(nn.Module):
    """A causal language model with its loss: what the engine calls, once a micro-batch on every rank."""

    def __init__(self, model: PreTrainedModel, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.head = replace_head(model, loss)

    def forward(self, batch: MicroBatch) -> Losses:
        """The losses of the micro-batch's supervised tokens."""
        here = device()
        predict_at_T, targets_T, weights_T = (
            torch.from_numpy(array).to(here) for array in (batch.predict_at, batch.targets, batch.weights)
        )
        inputs = {
            "input_ids": torch.from_numpy(batch.input_ids)[None].to(here),
            "position_ids": torch.from_numpy(batch.position_ids)[None].to(here),
            "use_cache": False,
        }
        if self.head is None:
            return full_logits_loss(self.model(**inputs).logits[0][predict_at_T], targets_T, weights_T, self.loss)
        hidden_SD = self.model.base_model(**inputs)[0][0]
        return cast(Losses, self.head(hidden_SD[predict_at_T], targets_T, weights_T))


@dataclass(frozen=True, slots=True)
class Partition:
    """One flat partition of this rank: where parameters lie in it, its float32 values and optimizer state."""

    index: int
    group: dict[str, Any]
    parameters: tuple[Parameter, ...]
    master: torch.Tensor
    state: dict[str, Any]


class Engine:
    """A model on ZeRO-3 with its optimizer."""

    def __init__(
        self,
        model_path: Path,
        optim: Optim,
        ds_config: dict[str, Any],
        precision: str,
        world: World,
        cpu_adam: bool = False,
        loss: Loss = Loss(),  # noqa: B008  # frozen
        adapter: Adapter | None = None,
        vocabulary: Vocabulary | None = None,
        seed: int = 0,
    ) -> None:
        """Load this rank's partitions and set the engine up.

        Args:
            cpu_adam: whether DeepSpeed's own Adam for states in host memory is built.
            vocabulary: where config and tokenizer are, if not beside the weights, and the rows of new tokens.
            seed: of first values that are in no file.

        Raises:
            ModelError: the folder is no model, tensors are missing or misshapen.
            ConfigError: a layer that is to get an adapter does not exist, or cannot have one.
        """
        import deepspeed

        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        vocabulary = vocabulary or Vocabulary(model_path)
        model = skeleton(vocabulary.folder, dtype)
        shards = shards_of(model, model_path)
        check_tensors(model, shards, vocabulary_parameters(model) if vocabulary.new_rows else ())
        self.tied, self.renamed = _tied_names(model), shards.renamed
        materialise_buffers(model, shards, device())  # while the parameters have their shapes
        self.adapted = add_adapters(model, adapter, bool(vocabulary.new_rows)) if adapter else None
        initial = Initial(model, shards, seed, vocabulary.new_rows)
        self.parameters = _partition(model, initial, ds_config, dtype, world)
        objective = Objective(model, loss)
        offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        adamw = deepspeed.ops.adam.DeepSpeedCPUAdam if offload and cpu_adam else torch.optim.AdamW
        self.world, self.dtype = world, precision
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(parameter_groups(model, optim), optim, adamw),
            config=ds_config,
        )
        if self._engine.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what initialize used and freed

    def micro_step(self, batch: MicroBatch, weight: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch of a step.

        Args:
            weight: summed weight of the supervised tokens of the whole global batch, over all ranks and
                micro-steps; 0 if nothing is supervised, and the gradient is then 0.
            last: whether this is the step's last micro-batch.

        Returns:
            This micro-batch's weighted sum of cross-entropies, detached.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        with documents(batch.document_offsets.tolist()):
            loss, cross_entropy = self._engine(batch)
            # DeepSpeed averages gradients over the ranks; times world makes that the sum which rule 1 asks for.
            self._engine.backward(loss * (self.world.world_size / (weight or 1.0)), scale_wrt_gas=False)
        return cast(torch.Tensor, cross_entropy)

    def step(self, learning_rate: float) -> bool:
        """The optimizer step of the gradients so far; False if it was skipped for a non-finite one."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return bool(self._engine.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """The global norm of the last step's gradient, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps the flat partitions."""
        return cast(torch.optim.Optimizer, self._optimizer.optimizer)

    def sizes(self) -> tuple[int, int]:
        """Elements of the parameters that are trained, and of all."""
        sizes = [(p.requires_grad, prod(cast(Any, p).ds_shape)) for p in self.parameters.values()]
        return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)

    def partitions(self) -> Iterator[Partition]:
        """This rank's flat partitions, in DeepSpeed's order; it calls them sub-groups."""
        zero = self._optimizer
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for index, members in enumerate(zero.fp16_groups):
            parameters, offset = [], 0
            for member in members:
                length = member.partition_numel()
                parameters.append(Parameter(names[id(member)], tuple(member.ds_shape), offset, length))
                offset += length
            master = zero.fp32_partitioned_groups_flat[index]
            yield Partition(
                index=index,
                group=zero.param_groups[zero.sub_group_to_group_id[index]],
                parameters=tuple(parameters),
                master=master,
                state=zero.optimizer.state[master],
            )

    def refresh(self) -> None:
        """Make the model compute with the master values, after they were overwritten."""
        zero = self._optimizer
        zero._partition_all_parameters()  # gathered persistent parameters would be stale
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            flat = zero.fp16_partitioned_groups_flat[index]
            if flat.data_ptr() != master.data_ptr():
                flat.data.copy_(master.data)
            zero._unflatten_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that several modules share: name → the name that is kept."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _partition(
    model: PreTrainedModel, initial: Initial, ds_config: dict[str, Any], dtype: torch.dtype, world: World
) -> dict[str, nn.Parameter]:
    """Replace every meta parameter by a ZeRO-3 one whose partition is read from its byte range, or is new.

    The same as `zero.Init` and `from_pretrained` would leave behind, to the last bit, but no rank reads or
    holds more than its share.

    Returns:
        The ZeRO-3 parameters by Hugging Face's names.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

    init = deepspeed.zero.Init(config_dict_or_path=ds_config, dtype=dtype)
    parameters: dict[str, nn.Parameter] = {}
    replaced: dict[int, nn.Parameter] = {}
    for name, old in model.named_parameters():
        # A stand-in with the full shape and zero strides: it takes no memory.
        new = nn.Parameter(torch.empty(1, dtype=dtype, device=device()).expand(old.shape), old.requires_grad)
        new.__dict__.update(old.__dict__)
        init._convert_to_deepspeed_param(new)
        length = -(-old.numel() // world.world_size)
        partition = torch.zeros(length, dtype=dtype, device=device())
        start = length * world.rank
        count = min(length, max(0, old.numel() - start))
        if count:
            initial.read(plain_name(name), start, count, partition)
        partition.ds_numel = length  # type: ignore[attr-defined]
        partition.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
        partition.final_location = None  # type: ignore[attr-defined]
        new.ds_tensor = partition  # type: ignore[attr-defined]
        new.ds_numel_aligned = length * world.world_size  # type: ignore[attr-defined]
        new.data = torch.empty(0, dtype=dtype, device=device())
        new.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
        parameters[plain_name(name)] = replaced[id(old)] = new
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replaced[id(parameter)]
    return parameters
