"""Which precision to compute in, chosen by measurement where the run file says `auto`.

CPUs differ: with AMX, bfloat16 products are many times faster than float32's; without, the backward pass
of a layer can be a hundred times slower. A product and both its transposed forms are measured.
"""

import time
from typing import Literal

import torch

Precision = Literal["bfloat16", "float32"]


def measure_precision(size: int = 512) -> Precision:
    """The faster precision of this device: a few milliseconds on a CPU, nothing on CUDA."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _seconds(torch.bfloat16, size) < _seconds(torch.float32, size) else "float32"


def _seconds(dtype: torch.dtype, size: int) -> float:
    """The best of three times for a linear layer's three products."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _ = a @ b
        _ = a @ b.T
        _ = a.T @ b
        times.append(time.perf_counter() - start)
    return min(times)
