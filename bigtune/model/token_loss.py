"""The loss of each position from its logits, and its gradient: what the loss head does with one chunk.

On CUDA it is one fused kernel of Liger (https://arxiv.org/abs/2410.10989) where that is installed and gives in a small
trial what torch gives; elsewhere, and for smoothed labels, it is torch. `kernels_used` tells what came of it.

Shapes: C tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from bigtune.config import Loss

kernels_used: set[str] = set()
"""Names of what computed losses, since the process began."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a model does to its logits after the output layer: multiplies them, then caps them softly."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "Change":
        """As configs of transformers say it: Cohere multiplies, Granite divides, Gemma 2 caps."""
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))


Each = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each position what is minimised [C], its plain cross-entropy [C], and the gradient of the first with respect to
the output layer's logits [C, V], written over these; float32."""
Kernel = Callable[[torch.Tensor, torch.Tensor, Change, Loss], Each]


def each_token(logits_CV: torch.Tensor, targets_C: torch.Tensor, change: Change, loss: Loss) -> Each:
    """The losses of a chunk of float32 logits as the output layer gives them; these are overwritten."""
    fused = logits_CV.is_cuda and not loss.label_smoothing and _able(_liger, change, loss, logits_CV.device)
    kernels_used.add("liger" if fused else "torch")
    return (_liger if fused else _torch)(logits_CV, targets_C, change, loss)


@lru_cache(maxsize=8)
def _able(kernel: Kernel, change: Change, loss: Loss, device: torch.device) -> bool:
    """Whether a kernel gives what torch gives, on a few tokens."""
    random = torch.Generator(device=device).manual_seed(0)
    logits = 3 * torch.randn(16, 1000, device=device, generator=random)
    targets = torch.randint(1000, (16,), device=device, generator=random)
    try:
        found, wanted = (one(logits.clone(), targets, change, loss) for one in (kernel, _torch))
    except Exception:  # not installed, another release, a compiler that fails: each in its own way
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def _liger(logits_CV: torch.Tensor, targets_C: torch.Tensor, change: Change, loss: Loss) -> Each:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward  # type: ignore[import-not-found]

    if change.scale != 1.0:
        logits_CV *= change.scale
    logits_CV.requires_grad_()  # it writes gradients over what asks for them alone
    with torch.no_grad():
        minimised_C, squared_C, *_, grad_CV = cross_entropy_forward(
            logits_CV, targets_C, None, -100, loss.z_loss, 0.0, "none", change.softcap, True
        )
        grad_CV = grad_CV.detach()
        return minimised_C, minimised_C - squared_C, grad_CV if change.scale == 1.0 else grad_CV.mul_(change.scale)


def _torch(logits_CV: torch.Tensor, targets_C: torch.Tensor, change: Change, loss: Loss) -> Each:
    logits_CV, slope_CV = changed(logits_CV, change)
    chosen_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
    most_C = logits_CV.amax(-1)
    mean_C = logits_CV.mean(-1) if loss.label_smoothing else None
    # A softmax reads and writes the logits once where logsumexp goes over them five times. Its largest value, which is
    # never small, tells the sum. For the plain loss the gradient is softmax - one-hot.
    grad_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    log_sum_C = most_C - grad_CV.amax(-1).log()
    minimised_C = minimise(log_sum_C, chosen_C, mean_C, loss)
    if loss.z_loss:
        grad_CV *= 1.0 + 2.0 * loss.z_loss * log_sum_C[:, None]
    if loss.label_smoothing:
        grad_CV -= loss.label_smoothing / grad_CV.shape[1]
    grad_CV[torch.arange(len(targets_C), device=grad_CV.device), targets_C] -= 1.0 - loss.label_smoothing
    if slope_CV is not None:
        grad_CV *= slope_CV
    return minimised_C, log_sum_C - chosen_C, grad_CV


def changed(logits: torch.Tensor, change: Change) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits as the model changes them, in place, and how steeply they rise with what they were; None for 1."""
    if change.scale != 1.0:
        logits *= change.scale
    if change.softcap is None:
        return logits, None if change.scale == 1.0 else torch.tensor(change.scale, device=logits.device)
    logits = logits.div_(change.softcap).tanh_()
    slope = (1.0 - logits.square()).mul_(change.scale)
    return logits.mul_(change.softcap), slope


def minimise(log_sum: torch.Tensor, chosen: torch.Tensor, mean: torch.Tensor | None, loss: Loss) -> torch.Tensor:
    """Cross-entropy with smoothed labels (https://arxiv.org/abs/1512.00567) and a penalty on the square of the
    partition function's logarithm, the z-loss (https://arxiv.org/abs/2204.02311), of each position [C].

    Args:
        log_sum: the logarithm of the partition function.
        chosen: the target's logit.
        mean: of all logits, where labels are smoothed.
    """
    each = log_sum - chosen
    if mean is not None:
        each = log_sum - (1.0 - loss.label_smoothing) * chosen - loss.label_smoothing * mean
    return each + loss.z_loss * log_sum.square() if loss.z_loss else each
