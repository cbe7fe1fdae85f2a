"""How many floating-point operations a model needs for a token, by two formulas, and how much of a roof that is.

PaLM's (https://arxiv.org/abs/2204.02311, appendix B) is the one that publishers use: 6 N + 12 L H Q T a token, with N
parameters, L layers, H heads of width Q, and attention over all T tokens of a row. It counts what packed documents do
not attend to, and a logit for every token. The exact one counts what is computed here:

    6 a parameter of the body and token, 6 a parameter of the head and supervised token,
    6 L H Q n² a document of n tokens: causal attention needs half a square

Of the 6, 2 are forward, 2 the gradient of the input and 2 that of the weight; a frozen weight needs 4. Of experts,
those count that a token is sent to. Embeddings count nothing, nor does what activation checkpointing computes again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides on its operations. Parameters are those that a token meets: of E experts, those of k."""

    parameters: int  # all, with embeddings
    body: int  # without embeddings and head
    head: int
    layers: int
    width: int  # of all heads of a layer, together
    hidden_size: int
    intermediate_size: int


def palm_flops(shape: Shape, tokens: float, sequence_length: int) -> float:
    """Operations of so many tokens, forward and backward, as PaLM counts them."""
    return tokens * (6.0 * shape.parameters + 12.0 * shape.layers * shape.width * sequence_length)


def exact_flops(shape: Shape, tokens: float, supervised: float, squares: float, frozen: bool = False) -> float:
    """Operations of so many tokens, forward and backward, as bigtune computes them.

    Args:
        supervised: tokens of them.
        squares: the sum of the documents' squared lengths, in tokens.
        frozen: whether the weights are an adapter's base; the adapter itself counts nothing.
    """
    of_weights = 4.0 if frozen else 6.0
    attention = 6.0 * shape.layers * shape.width * squares
    return of_weights * (shape.body * tokens + shape.head * supervised) + attention


def utilization(tflops: Mapping[str, float], roofs: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """Model FLOP utilization: by formula, the share of each roof that is known; in TFLOP/s of all ranks."""
    return {formula: {name: rate / roof for name, roof in roofs.items() if roof} for formula, rate in tflops.items()}


def shape_of(folder: Path, trusted: bool = False) -> Shape:
    """The shape of a model folder's model; no weight is read.

    Args:
        trusted: whether code of the folder may run.

    Raises:
        ModelError: the folder is no model that bigtune trains.
    """
    import torch
    from torch import nn

    from bigtune.model.load import skeleton

    model = skeleton(folder, torch.float32, trusted)
    config = model.config
    head = model.get_output_embeddings().weight
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 1)
    met = getattr(config, "num_experts_per_tok", None) or 1
    counts = {
        name: parameter.numel() * met // experts if ".experts." in name else parameter.numel()
        for name, parameter in model.named_parameters()
    }
    inside = [name for name, p in model.named_parameters() if id(p) not in looked_up and p is not head]
    heads, hidden = config.num_attention_heads, config.hidden_size
    return Shape(
        parameters=sum(counts.values()),
        body=sum(counts[name] for name in inside),
        head=head.numel(),
        layers=config.num_hidden_layers,
        width=heads * (getattr(config, "head_dim", None) or hidden // heads),
        hidden_size=hidden,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * hidden,
    )


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What families call the number of experts of a layer."""
