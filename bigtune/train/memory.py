"""What a rank's memory holds, by kind, as measured, and what is said where it does not suffice."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bigtune.data.collate import MicroBatch
from bigtune.errors import TrainError
from bigtune.train.engine import Engine

NO_MEMORY = "DefaultCPUAllocator"
"""What torch's error says where the CPU's memory is out; CUDA has an error of its own."""
SPARE = 0.9
"""Of the room for a micro-batch, what a smaller one is advised to use."""


class Memory:
    """Measures the first step, and explains the one that fails."""

    def __init__(self, engine: Engine, micro_batch: int) -> None:
        self._engine, self._micro_batch = engine, micro_batch
        self._saved: dict[int, int] = {}  # bytes by storage, of the first micro-batch
        self._measured = False

    @contextmanager
    def micro_step(self, batch: MicroBatch) -> Iterator[None]:
        """Around a micro-batch's forward and backward pass.

        Raises:
            TrainError: memory ran out.
        """
        counting = nullcontext() if self._saved else torch.autograd.graph.saved_tensors_hooks(self._keep, _kept)
        with self._explained(batch), counting:
            yield

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Around the optimizer's step.

        Raises:
            TrainError: memory ran out.
        """
        with self._explained(None):
            yield

    def first(self) -> dict[str, int]:
        """Bytes by kind, once, after the first step of this process; nothing later.

        Activations are what the first micro-batch's forward pass kept for its backward pass. What a checkpointed
        layer computes again is not in it.
        """
        if self._measured:
            return {}
        self._measured = True
        return {**self._held(), "activations": sum(self._saved.values())}

    def _held(self) -> dict[str, int]:
        seen: set[int] = set()
        held = {kind: distinct_bytes(tensors, seen) for kind, tensors in self._engine.held().items()}
        held["parameters"] += self._engine.own_shared_bytes
        return held

    def _keep(self, tensor: torch.Tensor) -> "torch.Tensor | _Weight":
        """Count what the graph keeps. Of a gathered parameter that is no tensor, or none would be released."""
        gathered = {p.data_ptr(): p for p in self._engine.parameters.values() if p.numel()}
        if tensor.data_ptr() in gathered:
            return _Weight(gathered[tensor.data_ptr()], tensor.size(), tensor.stride())
        storage = tensor.untyped_storage()
        self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    @contextmanager
    def _explained(self, batch: MicroBatch | None) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._error(batch, str(error)) from error
        except RuntimeError as error:
            if NO_MEMORY not in str(error):
                raise
            raise self._error(batch, str(error)) from error

    def _error(self, batch: MicroBatch | None, said: str) -> TrainError:
        held = to_text(self._held())
        if batch is None:
            return TrainError(
                f"out of memory in the optimizer step ({held}); use more ranks, optim.name: adamw_8bit, or deepspeed: "
                "zero3_offload"
            )
        pace = self._engine.pace
        share = min(1.0, pace.done / max(1, pace.layers))  # of the forward pass that was done
        fits = int(self._micro_batch * (SPARE * share if share < 1.0 else 0.5))
        if fits:
            mend = f"by what was measured train.micro_batch: {fits} would fit"
        else:
            tokens = int(batch.tokens * (SPARE * share if share < 1.0 else 0.5))
            mend = f"by what was measured data.sequence_length: {tokens:,} would fit"
        return TrainError(
            f"out of memory with train.micro_batch {self._micro_batch}, at {share:.0%} of the forward pass over "
            f"{batch.tokens:,} tokens ({held}); {mend}; or set train.activation_checkpointing: full"
        )


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter as an operation saw it, transposed perhaps; DeepSpeed gathers it again for the backward pass."""

    parameter: torch.nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]


def _kept(kept: torch.Tensor | _Weight) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    values = kept.parameter.data
    return values.as_strided(kept.size, kept.stride, values.storage_offset())


def distinct_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages that are not in `seen` yet, which they are added to."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def to_gib(held: Mapping[str, int]) -> dict[str, Any]:
    """For metrics.jsonl; nothing where nothing was measured."""
    return {"memory_gib": {kind: round(size / 2**30, 6) for kind, size in held.items()}} if held else {}


def to_text(held: Mapping[str, int]) -> str:
    """For people: `parameters 1.5 GiB, gradients 3.0 GiB, …`."""
    return ", ".join(f"{kind} {_size(size)}" for kind, size in held.items())


def _size(size: float) -> str:
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.2f} GiB"
