"""The learning rate: a pure function of the step."""

import math

from bigtune.config import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of one optimizer step.

    It rises linearly over `warmup_steps`, whose last step has the full rate, as has the one after; then it
    falls towards `final_learning_rate` × `learning_rate`, which the step after the last would have. So no
    step is spent at a rate of zero. Cosine: Loshchilov & Hutter, https://arxiv.org/abs/1608.03983. Warm-up, stable,
    decay: Hu et al. (MiniCPM), https://arxiv.org/abs/2404.06395, with a linear decay; before it the rate does not
    depend on `steps`, so that a run can go on for more steps from any checkpoint of its stable phase.

    Args:
        step: counted from 1.
        steps: the run's last step.
    """
    if step <= optim.warmup_steps:
        return optim.learning_rate * step / optim.warmup_steps
    after = steps - optim.warmup_steps
    progress = (step - 1 - optim.warmup_steps) / max(1, after)
    if optim.schedule == "constant":
        left = 1.0
    elif optim.schedule == "wsd":
        falling = min(after, optim.decay_steps or max(1, steps // 10))
        left = min(1.0, (steps + 1 - step) / (falling + 1))
    elif optim.schedule == "linear":
        left = 1.0 - progress
    else:
        left = (1.0 + math.cos(math.pi * progress)) / 2
    return optim.learning_rate * (optim.final_learning_rate + (1.0 - optim.final_learning_rate) * left)
