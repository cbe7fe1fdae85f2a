"""Write docs/optimizers.md from the table of bigtune/train/support.py; a test holds the two together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bigtune.train.support import PRESETS, TRAIN

HEAD = """# Optimizers, presets and schedules

What goes together, from `bigtune/train/support.py`. A run that asks for a refused pair is told so in one line, with
what to take, before any worker starts. A DeepSpeed JSON of your own counts as the preset that it is like: by its stage,
and whether it keeps optimizer states in host memory.

"""

OPTIMIZERS = """
## The optimizers

| `optim.name` | settings of its own | weight decay | bytes of state a parameter |
| --- | --- | --- | --- |
| `adamw` | `betas`, `epsilon` | decoupled | 8 |
| `adamw_8bit` | `betas`, `epsilon` | decoupled | 2 for matrices, 8 for the rest |
| `lion_8bit` | `betas` | decoupled | 1 for matrices, 4 for the rest |
| `sgd` | `momentum` | added to the gradient | 4, or 0 without momentum |
| `adam` | `betas`, `epsilon` | added to the gradient, as in `torch.optim.Adam` | 8 |

Float32 masters, 4 bytes more, come with each. Weights decay in the matrices alone; states have 8 bits in the matrices
alone: embeddings, the output head, norms and biases keep 32. A setting that the chosen optimizer does not have is an
error. Lion wants a learning rate three to ten times lower than AdamW's, and a weight decay as much higher. Each of
these updates an element by that element's own gradient and state: the result does not depend on how many ranks share
the work (with 8 bits, but for where blocks of 256 begin).

## The presets

| `deepspeed` | what a rank holds | when |
| --- | --- | --- |
| `zero3` | its share of weights, gradients and states | the model does not fit a rank, and by default |
| `zero3_offload` | the same; masters and states in host memory | GPU memory is short; slower |
| `zero2` | all weights in the training precision, its share of gradients, masters and states | the model fits: no \
weights are gathered while computing |

A checkpoint is resumed on any number of ranks, and with another preset where `--resume` asks for it; a merged model is
the same from each.

## The schedules

After `warmup_steps`, over which the rate rises by equal parts, `optim.schedule` is `cosine`, `linear` or `constant`, or
`wsd` (warm-up, stable, decay): constant, then linear over the last `decay_steps`. All fall towards
`final_learning_rate` × `learning_rate`. The rate is a function of the step alone, also across stops. With `wsd` a run
can be made longer later: raise `train.steps` and start with `--resume step-N` from a checkpoint before its decay; it
then equals a run that had those steps from the beginning.
"""


def document() -> str:
    """The page as Markdown."""
    reasons = list(dict.fromkeys(cell for row in TRAIN.values() for cell in row if cell))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return HEAD + _table("train, resume, merge", TRAIN, reasons) + "\n" + "\n".join(notes) + "\n" + OPTIMIZERS


def _table(corner: str, rows: Mapping[str, Sequence[str]], reasons: Sequence[str]) -> str:
    lines = [f"| {corner} | {' | '.join(f'`{preset}`' for preset in PRESETS)} |", "| --- " * (1 + len(PRESETS)) + "|"]
    for name, cells in rows.items():
        told = [f"refused ({reasons.index(cell) + 1})" if cell else "yes" for cell in cells]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path("docs/optimizers.md").write_text(document(), encoding="utf-8")
