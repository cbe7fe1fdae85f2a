"""A causal language model with its loss: what the engine calls, once a micro-batch on every rank.

Shapes: S tokens of a micro-batch, T its supervised tokens, D model width, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.config import Loss
from bigtune.data.collate import MicroBatch
from bigtune.dist import device
from bigtune.model import attention
from bigtune.model.head import full_logits_loss, replace_head
from bigtune.model.router import aux_loss_factor, imbalance

Asked = Literal["losses", "hidden", "logits", "head"]


class Objective(nn.Module):
    """The model, its loss head, and the loss of its routers where it has some.

    `packs` tells whether packed documents are computed at once, with packed attention; `head` is None where the model's
    own full logits are used.
    """

    def __init__(self, model: PreTrainedModel, loss: Loss) -> None:
        """Replace the model's output layer by the loss head, where that is one it knows.

        Raises:
            ModelError: the loss asks for what the model does not have.
        """
        super().__init__()
        self.model, self.loss, self.packs = model, loss, True
        self.head = replace_head(model, loss)
        self.aux_loss = aux_loss_factor(model, loss.router_aux_loss)

    def pack(self, packs: bool) -> None:
        """Compute packed documents at once, or each by itself with the model's own attention."""
        self.packs = packs
        configs = [module.config for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        for implementation in (attention.NAME,) if packs else ("sdpa", "eager"):
            try:
                self.model.set_attn_implementation(implementation)
            except (ValueError, ImportError):  # the model has none of it
                continue
            if self.model.config._attn_implementation == implementation:
                return
        for config in configs:  # it has one attention alone, but makes its mask by what stands here
            config._attn_implementation_internal = attention.NAME if packs else "eager"

    def forward(self, batch: MicroBatch, asked: Asked = "losses") -> Any:
        """Of a micro-batch what is asked for.

        `losses`: three float32 scalars: the summed loss to minimise, the summed cross-entropy without a gradient, and
        the auxiliary loss times the number of tokens. For a look at the model: `hidden` states [S, D], its own
        `logits` [S, V], or those that the loss `head` computes.
        """
        here = device()
        inputs = {
            "input_ids": torch.from_numpy(batch.input_ids)[None].to(here),
            "position_ids": torch.from_numpy(batch.position_ids)[None].to(here),
            "use_cache": False,
        }
        if asked == "logits":
            return self.model(**inputs).logits[0]
        if asked == "losses":
            return self._losses(batch, inputs)
        hidden_SD = self.model.base_model(**inputs)[0][0]
        return hidden_SD if asked == "hidden" or self.head is None else self.head.logits(hidden_SD)

    def _losses(self, batch: MicroBatch, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        predict_at_T, targets_T, weights_T = (
            torch.from_numpy(array).to(device()) for array in (batch.predict_at, batch.targets, batch.weights)
        )
        routed = {"output_router_logits": True} if self.aux_loss else {}
        if self.head is None:
            output = self.model(**inputs, **routed)
            losses = full_logits_loss(output.logits[0][predict_at_T], targets_T, weights_T, self.loss)
        else:
            output = self.model.base_model(**inputs, **routed)
            weighted = bool((batch.weights != 1.0).any())  # asked here, where a GPU need not be waited for
            losses = self.head(output[0][0][predict_at_T], targets_T, weights_T, weighted)
        aux = torch.zeros((), device=device())
        if self.aux_loss and batch.tokens and output.router_logits:
            offsets, chosen = batch.document_offsets.tolist(), self.model.config.num_experts_per_tok
            aux = self.aux_loss * imbalance(output.router_logits, offsets, chosen)
        return *losses, aux
