"""Output layer and cross-entropy in one module, on supervised positions only, chunk by chunk.

Logits exist for one chunk of positions at a time, in the forward pass only: it computes both gradients as
well, and the backward pass just scales them. The module holds the output layer's own weight, tied or not,
and is called exactly once a micro-batch on every rank, with no position at all if nothing is supervised;
otherwise ZeRO-3's collectives would fall out of step and hang.

Shapes: T supervised tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.errors import ModelError

CHUNK_LOGITS = 2**24
"""How many logits a chunk holds at most: 64 MiB of float32."""


class LossHead(nn.Module):
    """Replaces a model's output layer; keeps its parameters under their own names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the cross-entropies of T positions, a float32 scalar in nats; 0 for T = 0.

        `weights_T` is float32; weights of 1 change no bit of the plain sum and its gradients.
        """
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden_TD, self.weight, self.bias, targets_T, weights_T)
        return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_T: torch.Tensor,
        weights_T: torch.Tensor,
    ) -> torch.Tensor:
        tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        # Gradients of the weight are summed over chunks in float32, whatever the model's precision.
        grad_hidden_TD = torch.zeros_like(hidden_TD)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        chunk = max(1, CHUNK_LOGITS // vocabulary)
        for start in range(0, tokens, chunk):
            hidden_CD, targets_C, weights_C = (
                part[start : start + chunk] for part in (hidden_TD, targets_T, weights_T)
            )
            logits_CV = nn.functional.linear(hidden_CD, weight_VD, bias_V).float()
            log_sum_C = torch.logsumexp(logits_CV, dim=-1)
            chosen_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
            loss += ((log_sum_C - chosen_C) * weights_C).sum()
            # d loss / d logits = weight × (softmax - one-hot), written over the logits.
            grad_CV = logits_CV.sub_(log_sum_C[:, None]).exp_()
            grad_CV[torch.arange(len(targets_C), device=grad_CV.device), targets_C] -= 1.0
            grad_CV *= weights_C[:, None]  # always: to ask whether any is not 1 would make a GPU wait
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_CD.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_TD[start : start + chunk])
            if hidden_CD.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
            else:
                grad_weight_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype))
        ctx.grad_bias_V = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        grad_bias_V = None if ctx.grad_bias_V is None else ctx.grad_bias_V * grad_loss
        return grad_hidden_TD * grad_loss, grad_weight_VD.mul_(grad_loss), grad_bias_V, None, None


def replace_head(model: PreTrainedModel) -> LossHead:
    """Put a `LossHead` where the model has its output layer, and return it.

    Raises:
        ModelError: the output layer is not a plain linear one, or the model changes its logits afterwards.
    """
    linear = model.get_output_embeddings()
    config = model.config
    changed = [
        name
        for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0))
        if getattr(config, name, neutral) not in (None, neutral)
    ]
    if type(linear) is not nn.Linear or changed:
        why = f"its config sets {', '.join(changed)}" if changed else f"its output layer is {type(linear).__name__}"
        raise ModelError(f"{config.model_type}: {why}, which bigtune's loss head does not support yet")
    head = LossHead(linear)
    model.set_output_embeddings(head)
    return head
