"""The values that training begins with: those of the model's files, of adapters, and of the rows of new tokens.

What is not in the files follows from the seed and the parameter's name, so it is the same on any number of ranks.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from bigtune.errors import ModelError
from bigtune.model.adapter import plain_name
from bigtune.model.folds import is_adapter
from bigtune.model.weights import Weights

NOISE = 0.01
"""Of a new token's row, in standard deviations of each column."""
BLOCK = 2**22
"""Elements of an embedding that are read at once."""


class Initial:
    """Reads stretches of parameters, flattened, as `Weights` does."""

    def __init__(self, model: PreTrainedModel, weights: Weights, seed: int = 0, new_rows: range = range(0)) -> None:
        """Of a model on the meta device.

        Args:
            new_rows: rows of the embeddings that belong to new tokens; those beyond the files' are all among them.

        Raises:
            ModelError: they are not: the config beside the files promises more rows than there are.
        """
        self._weights, self._seed, self._rows = weights, seed, new_rows
        self._shapes = {plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._grown = vocabulary_parameters(model) if new_rows else frozenset()
        for name in self._grown:
            if weights.rows(name) < new_rows.start:
                raise ModelError(
                    f"{weights.shards.folder}: tensor {name} has {weights.rows(name)} rows, fewer than vocab_size of "
                    "its config.json; give the one that belongs to the files"
                )

    def read(self, name: str, start: int, count: int, out: torch.Tensor) -> None:
        """Fill `out[:count]` with elements start … start + count of a parameter."""
        if is_adapter(name):
            values = first_values(name, self._shapes[name], self._seed)
            out[:count].copy_(values.view(-1)[start : start + count])
        elif name in self._grown:
            self._read_grown(name, start, count, out)
        else:
            self._weights.read(name, start, count, out)

    def _read_grown(self, name: str, start: int, count: int, out: torch.Tensor) -> None:
        width = math.prod(self._shapes[name][1:])
        in_files = min(count, max(0, self._weights.rows(name) * width - start))
        if in_files:
            self._weights.read(name, start, in_files, out)
        first, last = self._rows.start * width, self._rows.stop * width
        begin, end = max(start, first), min(start + count, last)
        if begin < end:
            out[begin - start : end - start].copy_(self._new_rows(name, width)[begin - first : end - first])

    def _new_rows(self, name: str, width: int) -> torch.Tensor:
        """The mean of the rows before, with a little noise so that no two tokens are the same, flattened
        (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
        total, squares = torch.zeros(2, width, dtype=torch.float64)
        step = max(1, BLOCK // width)
        before = self._rows.start
        for row in range(0, before, step):
            rows = min(step, before - row)
            block = torch.empty(rows * width, dtype=torch.float32)
            self._weights.read(name, row * width, rows * width, block)
            values = block.view(rows, width).double()
            total, squares = total + values.sum(0), squares + values.square().sum(0)
        mean = total / before
        deviation = (squares / before - mean.square()).clamp_min(0.0).sqrt()
        noise = torch.randn(len(self._rows), width, generator=_generator(self._seed, name))
        made: torch.Tensor = mean + NOISE * deviation * noise
        return made.float().view(-1)


def first_values(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """An adapter's matrix by peft's rule, float32: A uniform within 1 / √inputs, B zero."""
    values = torch.zeros(*shape)
    if name.endswith(".lora_A.weight"):
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=_generator(seed, name))
    return values


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def vocabulary_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters with a row for each token: of the embeddings, and of the output layer."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in ids)
