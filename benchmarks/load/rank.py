"""One rank of run.py: it loads a model and tells what that took, as JSON on its last line.

python rank.py bigtune|transformers FOLDER [initialize]
"""

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import deepspeed
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # imports are no part of loading
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from bigtune.config import Optim
from bigtune.dist import World
from bigtune.model.load import skeleton
from bigtune.runfile import resolve
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine, connect

SAMPLE_SECONDS = 0.005
KIB = 1024


class _LoadedError(Exception):
    """Raised in place of `deepspeed.initialize`, where the load alone is asked for."""


class Meter:
    """Time, memory and bytes read from here on, against what the interpreter with its imports has and has read."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._stop, self._anonymous = threading.Event(), 0
        self._before, self._read = _status(), _io()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        torch.distributed.barrier()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._anonymous = max(self._anonymous, _status()["RssAnon"])

    def now(self) -> dict[str, float]:
        """Seconds; peaks over the baseline, of anonymous memory by samples and of all by the kernel's mark; bytes."""
        seconds, status, io = time.perf_counter() - self._began, _status(), _io()
        return {
            "seconds": seconds,
            "anonymous": max(self._anonymous, status["RssAnon"]) - self._before["RssAnon"],
            "resident": status["VmHWM"] - self._before["VmRSS"],
            "bytes_by_calls": io["rchar"] - self._read["rchar"],
            "bytes_from_disk": io["read_bytes"] - self._read["read_bytes"],
        }


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * KIB for line in lines if line[-1] == "kB"}


def _io() -> dict[str, int]:
    return {
        name: int(count)
        for name, count in map(str.split, Path("/proc/self/io").read_text().replace(":", "").splitlines())
    }


def main(side: str, folder: Path, until: str = "") -> None:
    """Load on this rank, and print what it took."""
    world = World.from_environment()
    connect(world)
    run = resolve(
        {
            "model": {"path": str(folder)},
            "data": {"sources": [{"path": "none"}]},
            "output": "none",
            "train": {"steps": 1},
        }
    )
    width = AutoConfig.from_pretrained(folder).hidden_size
    ds_config = complete(read_preset("zero3"), run, "bfloat16", width)
    skeleton(folder, torch.bfloat16)  # these two import on the way what either side needs
    deepspeed.DeepSpeedConfig(ds_config)
    gc.collect()
    meter = Meter()
    found: dict[str, Any] = {}
    with meter:
        load = _bigtune if side == "bigtune" else _transformers
        parameters = load(folder, ds_config, world, meter, found, until == "initialize")
    found["partition"] = sum(parameter.ds_tensor.nbytes for parameter in parameters.values())
    found["digest"] = _digest(parameters, world)
    print(json.dumps(found), flush=True)
    torch.distributed.barrier()
    os._exit(0)


def _bigtune(
    folder: Path, ds_config: dict[str, Any], world: World, meter: Meter, found: dict[str, Any], whole: bool
) -> dict[str, Any]:
    """Its engine, up to `deepspeed.initialize`, or with it."""
    initialize, kept = deepspeed.initialize, dict[str, Any]()

    def marked(model: Any, **settings: Any) -> Any:
        found["load"] = meter.now()
        if not whole:
            kept.update(model.model.named_parameters())
            raise _LoadedError
        return initialize(model=model, **settings)

    deepspeed.initialize = marked
    try:
        engine = Engine(folder, Optim(name="sgd", momentum=0.0), ds_config, "bfloat16", world)
    except _LoadedError:
        return kept
    found["initialize"] = meter.now()
    return dict(engine.parameters)


def _transformers(
    folder: Path, ds_config: dict[str, Any], world: World, meter: Meter, found: dict[str, Any], whole: bool
) -> dict[str, Any]:
    """`from_pretrained` with ZeRO-3 switched on, as its documentation has it."""
    alive = HfDeepSpeedConfig(ds_config)  # noqa: F841  # transformers looks whether there is one
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found["load"] = meter.now()
    return dict(model.named_parameters())


def _digest(parameters: dict[str, Any], world: World) -> str:
    """Of this rank's elements, without padding."""
    total = xxhash.xxh3_128()
    for name, parameter in sorted(parameters.items()):
        values = parameter.ds_tensor
        count = min(values.numel(), max(0, parameter.ds_numel - values.numel() * world.rank))
        total.update(f"{name} {count} ".encode())
        total.update(values[:count].contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
