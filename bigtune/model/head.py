"""Output layer and loss in one module, on supervised positions only, chunk by chunk.

Logits exist for one chunk of positions at a time, in the forward pass only: it computes both gradients as
well, and the backward pass just scales them. The module holds the output layer's own weight, tied or not,
and is called exactly once a micro-batch on every rank, with no position at all if nothing is supervised;
otherwise ZeRO-3's collectives would fall out of step and hang.

A model whose logits this module does not give, exactly, keeps its own output layer: see `full_logits_loss`.

Shapes: T supervised tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.config import Loss
from bigtune.model.token_loss import Change, changed, each_token, minimise

CHUNK_LOGITS = 2**24
"""How many logits a chunk holds at most: 64 MiB of float32."""

Losses = tuple[torch.Tensor, torch.Tensor]
"""Two float32 scalars in nats, summed over positions by their weights: what is minimised, and, without a gradient, the
cross-entropy alone."""


class LossHead(nn.Module):
    """Replaces a model's output layer; keeps its parameters under their own names."""

    def __init__(self, linear: nn.Linear, change: Change = Change(), loss: Loss = Loss()) -> None:  # noqa: B008  # frozen
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.change, self.loss = change, loss

    def forward(
        self,
        hidden_D: torch.Tensor,
        targets_T: torch.Tensor | None = None,
        weights_T: torch.Tensor | None = None,
        weighted: bool = True,
    ) -> Losses | torch.Tensor:
        """The loss of T positions, of hidden states [T, D]; 0 for T = 0.

        `weights_T` is float32; `weighted` tells whether any is not 1. Without targets this is the plain output layer
        that the model's own forward pass expects: logits [..., V] of hidden states [..., D].
        """
        if targets_T is None or weights_T is None:
            return nn.functional.linear(hidden_D, self.weight, self.bias)
        losses: Losses = _ChunkedLoss.apply(
            hidden_D, self.weight, self.bias, targets_T, weights_T, weighted, self.change, self.loss
        )
        return losses

    def logits(self, hidden_D: torch.Tensor) -> torch.Tensor:
        """What the model's own logits [..., V] should be: of hidden states [..., D], float32."""
        return changed(self(hidden_D).float(), self.change)[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_T: torch.Tensor,
        weights_T: torch.Tensor,
        weighted: bool,
        change: Change,
        loss: Loss,
    ) -> Losses:
        tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        minimised, plain = torch.zeros(2, dtype=torch.float32, device=hidden_TD.device)
        # Gradients of the weight are summed over chunks in float32, whatever the model's precision.
        grad_hidden_TD = torch.zeros_like(hidden_TD)
        grad_weight_VD = None  # where the output layer is frozen
        if ctx.needs_input_grad[1]:
            first = torch.empty if tokens else torch.zeros
            grad_weight_VD = first(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        chunk = max(1, CHUNK_LOGITS // vocabulary)
        for start in range(0, tokens, chunk):
            hidden_CD, targets_C, weights_C = (
                part[start : start + chunk] for part in (hidden_TD, targets_T, weights_T)
            )
            logits_CV = nn.functional.linear(hidden_CD, weight_VD, bias_V).float()
            minimised_C, plain_C, grad_CV = each_token(logits_CV, targets_C, change, loss)
            minimised += (minimised_C * weights_C).sum()
            plain += (plain_C * weights_C).sum()
            if weighted:
                grad_CV *= weights_C[:, None]
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_CD.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_TD[start : start + chunk])
            if grad_weight_VD is None:
                continue
            if hidden_CD.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.T, hidden_CD, beta=float(start > 0))  # 0 reads nothing
            elif start:
                grad_weight_VD += grad_CV.T @ hidden_CD
            else:
                grad_weight_VD.copy_(grad_CV.T @ hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        ctx.grad_bias_V = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        ctx.mark_non_differentiable(plain)
        return minimised, plain

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        grad_bias_V = None if ctx.grad_bias_V is None else ctx.grad_bias_V * grad_loss
        if grad_weight_VD is not None:
            grad_weight_VD.mul_(grad_loss)
        return grad_hidden_TD * grad_loss, grad_weight_VD, grad_bias_V, None, None, None, None, None


def full_logits_loss(logits_TV: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor, loss: Loss) -> Losses:
    """The same from logits that the model itself has computed, all at once."""
    logits = logits_TV.float()
    log_sum, chosen = torch.logsumexp(logits, dim=-1), logits.gather(1, targets_T[:, None]).squeeze(1)
    mean = logits.mean(-1) if loss.label_smoothing else None
    plain = ((log_sum - chosen) * weights_T).sum().detach()
    return (minimise(log_sum, chosen, mean, loss) * weights_T).sum(), plain


def replace_head(model: PreTrainedModel, loss: Loss = Loss()) -> LossHead | None:  # noqa: B008  # frozen
    """Put a `LossHead` where the model has its output layer, and return it; None, and nothing done, where the output
    layer is no plain linear one.

    That the head gives the model's own logits is shown by tests for the types in `bigtune.model.load.EXACT`, and by
    `bigtune.train.probe` for the others.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return None
    head = LossHead(linear, Change.of(model.config), loss)
    model.set_output_embeddings(head)
    return head
