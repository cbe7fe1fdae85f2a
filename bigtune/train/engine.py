"""The one place that knows DeepSpeed: exact micro-steps, the optimizer step, and what a rank holds.

Where ZeRO-3 and ZeRO-2 differ is in zero3.py and zero2.py, which offer the same functions. DeepSpeed's internals are
named in these three and nowhere else: `Partition` is what the rest of bigtune sees of them.
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
from transformers.modeling_layers import GradientCheckpointingLayer

from bigtune.checkpoint.layout import Parameter
from bigtune.config import Adapter, Loss, Optim
from bigtune.data.collate import MicroBatch, collate
from bigtune.dist import World, all_max, device
from bigtune.errors import ModelError
from bigtune.model.adapter import add_adapters
from bigtune.model.attention import documents
from bigtune.model.fused import fuse_layers
from bigtune.model.initial import Initial, vocabulary_parameters
from bigtune.model.load import EXACT, materialise_buffers, skeleton
from bigtune.model.recompute import checkpoint_activations
from bigtune.model.vocabulary import Vocabulary
from bigtune.model.weights import Weights, tied_names
from bigtune.train.objective import Asked, Objective
from bigtune.train.optim import build_optimizer, parameter_groups
from bigtune.train.pace import Pace
from bigtune.train.phases import Phases
from bigtune.train.zero2 import Zero2
from bigtune.train.zero3 import Zero3


def connect(world: World, store: Any = None) -> None:
    """Join the other workers: NCCL on CUDA, gloo elsewhere.

    Args:
        store: where they have met; by default they meet as the environment tells.
    """
    import deepspeed

    # The shared-memory op would be compiled here, though only inference collectives use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if store is not None:
        torch.distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


@dataclass(frozen=True, slots=True)
class Partition:
    """One flat partition of this rank: where parameters lie in it, its float32 values and optimizer state."""

    index: int
    group: dict[str, Any]
    parameters: tuple[Parameter, ...]
    master: torch.Tensor
    state: dict[str, Any]


class Engine:
    """A model on ZeRO-3, or ZeRO-2, with its optimizer."""

    def __init__(
        self,
        model_path: Path,
        optim: Optim,
        ds_config: dict[str, Any],
        precision: str,
        world: World,
        cpu_adam: bool = False,
        loss: Loss = Loss(),  # noqa: B008  # frozen
        activation_checkpointing: str | int = "none",
        adapter: Adapter | None = None,
        vocabulary: Vocabulary | None = None,
        seed: int = 0,
    ) -> None:
        """Load this rank's partitions and set the engine up.

        Args:
            cpu_adam: whether DeepSpeed's own Adam for states in host memory is built.
            activation_checkpointing: "none", "full", or k for every k-th layer.
            vocabulary: where config and tokenizer are, if not beside the weights, and the rows of new tokens.
            seed: of first values that are in no file.

        Raises:
            ModelError: the folder is no model, tensors are missing or misshapen.
            ConfigError: a layer that is to get an adapter does not exist, or cannot have one.
        """
        import deepspeed

        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        vocabulary = vocabulary or Vocabulary(model_path)
        model = skeleton(vocabulary.folder, dtype, vocabulary.trusted)
        weights = Weights.of(model, model_path, vocabulary_parameters(model) if vocabulary.new_rows else ())
        self.tied, self.joined, self.saved_buffers = tied_names(model), weights.joined, weights.saved_buffers()
        self.unexpected = weights.unexpected
        materialise_buffers(model, weights, device())  # while the parameters have their shapes
        self.adapted = add_adapters(model, adapter, bool(vocabulary.new_rows)) if adapter else None
        self.fused = fuse_layers(model)
        initial = Initial(model, weights, seed, vocabulary.new_rows)
        offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        self._stage: Zero2 | Zero3 = Zero2() if ds_config["zero_optimization"]["stage"] == 2 else Zero3(world, offload)
        self.parameters: dict[str, nn.Parameter] = self._stage.load(model, initial, ds_config, dtype, world)
        if model.config.model_type not in EXACT:
            _gather_whole_layers(model, self._stage)
        checkpoint_activations(model, activation_checkpointing)
        self.objective = Objective(model, loss)
        self._aux_sum = torch.zeros((), device=device())
        adamw = deepspeed.ops.adam.DeepSpeedCPUAdam if offload and cpu_adam else torch.optim.AdamW
        self.world, self.dtype = world, precision
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.objective,
            optimizer=build_optimizer(parameter_groups(model, optim), optim, adamw),
            config=self._stage.settings(ds_config),
        )
        self.phases = Phases()
        self._stage.take_over(self._optimizer, self.parameters.values(), self.phases)
        self.pace = Pace(self.objective, self._stage.gathers)
        if self._engine.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what initialize used and freed

    def micro_step(self, batch: MicroBatch, weight: float, tokens: int, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch of a step.

        Args:
            weight: summed weight of the supervised tokens of the whole global batch, over all ranks and
                micro-steps; 0 if nothing is supervised, and the gradient is then 0.
            tokens: of the whole global batch.
            last: whether this is the step's last micro-batch.

        Returns:
            This micro-batch's weighted sum of cross-entropies, detached.
        """
        parts = [batch] if self.objective.packs else self._apart(batch)
        sums = []
        for index, part in enumerate(parts):
            self._engine.set_gradient_accumulation_boundary(last and index == len(parts) - 1)
            self.pace.done = 0
            with documents(part.document_offsets.tolist()):
                with self.phases.phase("forward"):
                    loss, cross_entropy, aux = self._engine(part)
                loss = loss + aux * (weight / max(1, tokens))
                # 1, or NaN: a loss that is not finite may have a gradient that is, and must not pass by it.
                finite = 1.0 + 0.0 * (loss + cross_entropy).detach()
                # Where DeepSpeed averages gradients over ranks, times world makes that the sum which rule 1 asks for.
                scale = finite * ((self.world.world_size if self._stage.averages else 1) / (weight or 1.0))
                with self.phases.phase("backward"):
                    self._engine.backward(loss * scale, scale_wrt_gas=False)
            sums.append(cross_entropy)
            self._aux_sum = self._aux_sum + aux.detach()
        return torch.stack(sums).sum()

    def take_aux_sum(self) -> float | None:
        """The auxiliary loss times tokens of this rank's micro-steps since the last call; None without routers."""
        aux_sum, self._aux_sum = float(self._aux_sum), torch.zeros((), device=device())
        return aux_sum if self.objective.aux_loss else None

    def _apart(self, batch: MicroBatch) -> list[MicroBatch]:
        """Document by document, for a model that cannot keep packed ones apart; as many on every rank."""
        alone = batch.apart()
        return alone + [collate([])] * (int(all_max(len(alone))) - len(alone))

    def look(self, batch: MicroBatch, asked: Asked) -> torch.Tensor:
        """What the model computes of a micro-batch, as `Objective.forward` says, without dropout and gradients."""
        self._engine.eval()
        with torch.no_grad(), documents(batch.document_offsets.tolist()):
            found: torch.Tensor = self._engine(batch, asked)
        self._engine.train()
        return found

    def cross_entropy(self, batch: MicroBatch) -> torch.Tensor:
        """A micro-batch's weighted sum of cross-entropies, without dropout and gradients."""
        parts = [batch] if self.objective.packs else self._apart(batch)
        return torch.stack([self.look(part, "losses")[1] for part in parts]).sum()

    def step(self, learning_rate: float) -> bool:
        """The optimizer step of the gradients so far.

        Returns:
            On every rank the same: False where a loss or gradient of any rank was not finite. Nothing has changed then.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with self.phases.phase("optimizer"):
            self._engine.step()
        return bool(self._engine.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """The global norm of the last step's gradient, before clipping; infinite where it was skipped."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps the flat partitions."""
        return cast(torch.optim.Optimizer, self._optimizer.optimizer)

    def sizes(self) -> tuple[int, int]:
        """Elements of the parameters that are trained, and of all."""
        sizes = [(p.requires_grad, prod(getattr(p, "ds_shape", p.shape))) for p in self.parameters.values()]
        return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)

    def partitions(self) -> Iterator[Partition]:
        """This rank's flat partitions, in DeepSpeed's order; it calls them sub-groups."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for index, (parameters, master, group) in enumerate(self._stage.groups(names)):
            yield Partition(index, group, parameters, master, state=self.base_optimizer.state[master])

    def held(self) -> dict[str, list[torch.Tensor]]:
        """The lasting tensors of this rank by kind, wherever they lie; some share memory."""
        states = [value for state in self.base_optimizer.state.values() for value in state.values()]
        held: dict[str, list[torch.Tensor]] = self._stage.held(self.parameters.values())
        held["parameters"] += self._engine.module.buffers()
        held["optimizer"] += [state for state in states if isinstance(state, torch.Tensor)]
        return held

    @property
    def own_shared_bytes(self) -> int:
        """This rank's part of the parameters, where they are in memory that all ranks of the host share."""
        return self._stage.own_shared_bytes

    def replicas(self) -> dict[str, list[torch.Tensor]]:
        """What each rank holds whole, and the same as every other."""
        whole = self._stage.replicas(self.parameters.values())
        return {"parameters": whole, "buffers": list(self._engine.module.buffers())}

    def refresh(self) -> None:
        """Make the model compute with the master values, after they were overwritten."""
        self._stage.refresh()


def _gather_whole_layers(model: PreTrainedModel, stage: Any) -> None:
    """For types that no test holds: some use weights of parts that they do not call, or call other parts on each rank.

    Raises:
        ModelError: the stage gathers nothing, and would reduce other gradients on each rank.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if isinstance(stage, Zero2):
        raise ModelError("models of this type are trained with ZeRO-3 alone; set deepspeed: zero3")
    set_z3_leaf_modules(model, [GradientCheckpointingLayer], raise_if_not_found=False)
    model.enable_input_require_grads()  # DeepSpeed knows by a layer's input when its backward pass is over
