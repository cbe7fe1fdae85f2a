"""How long this rank computes where it waits for no other, so that a slow one shows.

Under ZeRO-3 the ranks wait for each other in every layer, forward and backward: a step takes all of them equally
long, whoever is slow. Within the forward pass of a layer that has no other in it nothing is waited for, since its
parameters are gathered before; hence these are timed: a fixed part of the step's work, which a rank on a slower or
shared processor does more slowly. Where nothing is gathered it is the forward pass as a whole. On CUDA the clock is the
GPU's own.
"""

from typing import Any

from torch import nn

from bigtune.train.phases import now, seconds_between


class Pace:
    """Times forward passes, and counts those of a model's innermost layers that hold a matrix."""

    def __init__(self, model: nn.Module, gathers: bool) -> None:
        """Call it once DeepSpeed's hooks are on: those gather parameters, and belong outside of what is timed.

        Args:
            gathers: whether ranks wait for each other within the forward pass.
        """
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        innermost = [module for module in model.modules() if _holds_matrix(module) and not any(module.children())]
        self.layers = len(innermost)
        self.done = 0  # forward passes of layers in the micro-batch at work
        for module in innermost:
            module.register_forward_hook(self._count)
        for module in innermost if gathers else [model]:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, prepend=True)

    def take(self) -> float:
        """Seconds since the last call. On CUDA, call it where the host has waited for the step's work anyway."""
        spans, self._spans = self._spans, []
        return sum(seconds_between(began, ended) for began, ended in spans)

    def _begin(self, *_: Any) -> None:
        self._began = now()

    def _end(self, *_: Any) -> None:
        self._spans.append((self._began, now()))

    def _count(self, *_: Any) -> None:
        self.done += 1


def _holds_matrix(module: nn.Module) -> bool:
    return any(len(getattr(p, "ds_shape", p.shape)) > 1 for p in module.parameters(recurse=False))
