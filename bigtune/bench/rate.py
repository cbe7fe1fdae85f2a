"""How fast this host multiplies matrices of a model's shapes while a run's ranks all do: the roof of its steps.

python -m bigtune.bench.rate MODEL PRECISION    one rank, described in the environment; prints its figures as JSON
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtune.bench.flops import Shape, shape_of
from bigtune.dist import World, device
from bigtune.errors import BigtuneError, LaunchError
from bigtune.train.cores import bind

SECONDS = 3.0
TOKENS = {"cpu": 1024, "cuda": 8192}
"""Rows of the matrices: enough for a device's full speed."""
PRODUCTS = 5
"""Between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class Roof:
    """What the ranks reach together, in 10^12 operations a second, and the shape of the model."""

    tflops: float
    shape: Shape


def measure_roof(model: Path, ranks: int, precision: str, trusted: bool = False) -> Roof:
    """Measure on so many ranks at once, each on its own cores or GPU, for some seconds.

    Args:
        precision: bfloat16 or float32.
        trusted: whether code of the model's folder may run.

    Raises:
        LaunchError: a rank could not.
    """
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bigtune.bench.rate", str(model), precision, *["--trusted"] * trusted],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or [f"ended with code {process.returncode}"])[-1]
            raise LaunchError(f"{model}: the rate of matrix products could not be measured: {last}")
    found = [json.loads(out) for out, _ in said]
    return Roof(sum(each["tflops"] for each in found), Shape(**found[0]["shape"]))


def _rate(shape: Shape, precision: str) -> float:
    """Of a linear layer's three products: forward, and the gradients of its input and of its weight."""
    import torch

    here = device()
    dtype, tokens = getattr(torch, precision), TOKENS[here.type]
    inputs = torch.randn(tokens, shape.hidden_size, device=here).to(dtype)
    weight = torch.randn(shape.intermediate_size, shape.hidden_size, device=here).to(dtype)
    outputs = torch.randn(tokens, shape.intermediate_size, device=here).to(dtype)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(inputs, weight.T)
            torch.mm(outputs, weight)
            torch.mm(outputs.T, inputs)
        if here.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(1)
    least, ends = seconds(PRODUCTS), time.monotonic() + SECONDS
    while time.monotonic() < ends:
        least = min(least, seconds(PRODUCTS))
    return PRODUCTS * 6 * tokens * shape.hidden_size * shape.intermediate_size / least / 1e12


def main(model: str, precision: str, *options: str) -> None:
    """Measure on this rank."""
    world = World.from_environment()
    bind(world)  # before torch is imported
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    try:
        shape = shape_of(Path(model), "--trusted" in options)
    except BigtuneError as error:
        sys.exit(str(error))
    print(json.dumps({"tflops": _rate(shape, precision), "shape": asdict(shape)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
