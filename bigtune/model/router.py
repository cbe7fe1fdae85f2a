"""How evenly a mixture of experts is used: the auxiliary loss of its routers, with a normalisation that packing, ranks
and accumulation do not change.

For a document of n tokens and a layer of E experts it is E · Σ_e share_e · probability_e, where share_e counts the
document's tokens that went to expert e, divided by n, and probability_e is the mean of the router's softmax: k for
routers that choose k experts evenly, more for others (Switch Transformer, https://arxiv.org/abs/2101.03961, equations
4 to 6; by sequence as in DeepSeek-V3, https://arxiv.org/abs/2412.19437). Layers are averaged, and documents weighted
by their tokens: over a global batch, the mean over its tokens. Of one document and one layer it is what transformers
computes.

Shapes: S tokens of a micro-batch, E experts, N documents.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bigtune.errors import ModelError


def aux_loss_factor(model: Any, asked: float | None) -> float:
    """By what the auxiliary loss is multiplied: as the run file or else the model's config says; 0 without routers.

    Raises:
        ModelError: the run file asks for it, and the model has no routers.
    """
    routed = "router_logits" in (getattr(model.base_model, "_can_record_outputs", None) or {})
    if asked and not routed:
        raise ModelError(
            f"loss.router_aux_loss is {asked}, but a {model.config.model_type} model has no experts to choose from; "
            "drop it"
        )
    factor = getattr(model.config, "router_aux_loss_coef", None) if asked is None else asked
    return float(factor or 0.0) if routed else 0.0


def imbalance(router_logits: Sequence[torch.Tensor], offsets: Sequence[int], experts_a_token: int) -> torch.Tensor:
    """The sum over documents of their tokens × their imbalance, averaged over layers; a scalar.

    Args:
        router_logits: of each layer, [S, E] or with leading dimensions of 1.
        offsets: where documents begin and end, N + 1 numbers from 0 to S.
    """
    here = router_logits[0].device
    lengths_N = torch.tensor(offsets, device=here).diff()
    document_S = torch.repeat_interleave(lengths_N)
    total = torch.zeros((), device=here)
    for logits in router_logits:
        experts = logits.shape[-1]
        probability_SE = logits.reshape(-1, experts).float().softmax(-1)
        chosen = probability_SE.detach().topk(experts_a_token, dim=-1).indices
        taken_SE = torch.zeros_like(probability_SE).scatter_(1, chosen, 1.0)
        zeros_NE = torch.zeros(len(lengths_N), experts, device=here)
        counts_NE = zeros_NE.index_add(0, document_S, taken_SE)
        sums_NE = zeros_NE.index_add(0, document_S, probability_SE)
        total = total + experts * ((counts_NE * sums_NE).sum(-1) / lengths_N).sum()
    return total / len(router_logits)
