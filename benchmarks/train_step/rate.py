"""How many 10^12 operations a second one rank does in the products of a model's layers, while the others do the same.

python rate.py MODEL PRECISION
"""

import sys
import time

from bigtune.dist import World
from bigtune.train.cores import bind

model, precision = sys.argv[1:]
bind(World.from_environment())

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

SECONDS = 4.0
TOKENS = 1024

config = AutoConfig.from_pretrained(model)
dtype = getattr(torch, precision)
inputs = torch.randn(TOKENS, config.hidden_size).to(dtype)
weight = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
outputs = torch.randn(TOKENS, config.intermediate_size).to(dtype)


def products() -> None:
    """A linear layer's three: forward, and the gradients of its input and of its weight."""
    torch.mm(inputs, weight.T)
    torch.mm(outputs, weight)
    torch.mm(outputs.T, inputs)


products()
best, ends = 0.0, time.monotonic() + SECONDS
while time.monotonic() < ends:
    began = time.monotonic()
    for _ in range(5):
        products()
    best = max(best, 5 / (time.monotonic() - began))
print(best * 6 * TOKENS * config.hidden_size * config.intermediate_size / 1e12)
