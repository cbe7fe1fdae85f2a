"""How fast, in how much memory and with how many bytes read does a model become ZeRO-3 partitions?

    python benchmarks/load/run.py --result benchmarks/load/result.json

A Llama with fresh weights in bfloat16 is written, in several files. Then bigtune and transformers' `from_pretrained`
under ZeRO-3 load it in turn, each in new processes over gloo, from the page cache; and once more after its pages were
dropped, which shows what comes from the disk. Both must leave the same partitions behind, to the last bit.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig

from bigtune.model.load import skeleton
from bigtune.model.shards import INDEX, memory_of
from bigtune.tensorfile import PIECE_BYTES, Content, write

SIZES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 5504, "num_attention_heads": 16},
    "40M": {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1376, "num_attention_heads": 8},
}
SHARD_BYTES = 400_000_000
SIDES = ("bigtune", "transformers")


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="1B", show_default=True)
@click.option("--ranks", multiple=True, type=int, default=(2, 4), show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Write the figures here as well.")
def main(size: str, ranks: tuple[int, ...], repeats: int, result: Path | None) -> None:
    """Measure and print the figures as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = _make(folder, SIZES[size])
        files = [path.stat().st_size for path in folder.glob("*.safetensors")]
        figures: dict[str, Any] = {"parameters": parameters, "files": len(files), "bytes": sum(files)}
        runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
        os.sync()  # or the first loads share the disk with the files' own writing
        for _ in range(repeats):
            for world in ranks:
                for side in SIDES:
                    runs.setdefault((world, side), []).append(_run(side, folder, world))
        for world in ranks:
            ours, theirs = (_summary(runs[world, side], sum(files)) for side in SIDES)
            for side, summary in zip(SIDES, (ours, theirs), strict=True):
                summary["after the pages were dropped"] = _cold(side, folder, world, sum(files))
            ours["with deepspeed.initialize"] = _run("bigtune", folder, world, "initialize")["initialize"]
            figures[f"{world} ranks"] = {
                "bigtune": ours, "transformers": theirs, "times as fast": theirs["seconds"] / ours["seconds"],
                "the same partitions": len({run["digest"] for side in SIDES for run in runs[world, side]}) == 1,
            }  # fmt: skip
    text = json.dumps(_rounded(figures), indent=1) + "\n"
    click.echo(text, nl=False)
    if result:
        result.write_text(text, encoding="utf-8")


def _make(folder: Path, sizes: Mapping[str, int]) -> int:
    """Write a model file by file and piece by piece, so that it is never in memory; how many parameters it has."""
    config = LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, parameter in skeleton(folder, torch.bfloat16).named_parameters():
        if not shards or 2 * parameter.numel() > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tuple(parameter.shape)
        room -= 2 * parameter.numel()
    where = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: Content("BF16", shape, _random(name, prod(shape))) for name, shape in shapes.items()}
        write(folder / file, tensors, {"format": "pt"})
        where |= dict.fromkeys(shapes, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(prod(shape) for shapes in shards for shape in shapes.values())


def _random(name: str, count: int) -> Iterator[memoryview]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for start in range(0, count, PIECE_BYTES):
        values = torch.randn(min(PIECE_BYTES, count - start), generator=generator) * 0.02
        yield memory_of(values.bfloat16())


def _run(side: str, folder: Path, world: int, until: str = "") -> dict[str, Any]:
    """One load in new processes: the slowest rank's seconds, the most memory of one, the bytes of all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    shared = {
        **os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), side, str(folder), *([until] if until else [])]
    with tempfile.TemporaryFile() as errors:
        processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            for rank in range(world)
        ]
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            errors.seek(0)
            sys.exit(errors.read().decode(errors="replace")[-4000:])
    told = [json.loads(output.splitlines()[-1]) for output in outputs]
    found: dict[str, Any] = {"partition": max(one["partition"] for one in told)}
    found["digest"] = " ".join(one["digest"] for one in told)
    for stage in ("load", "initialize"):
        if stage in told[0]:
            found[stage] = {
                name: (sum if name.startswith("bytes") else max)(one[stage][name] for one in told)
                for name in told[0][stage]
            }
    click.echo(f"{side}, {world} ranks: {json.dumps(_rounded(found))}", err=True)
    return found


def _summary(runs: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """Medians of some runs' seconds, the worst of their memory and bytes."""
    loads = [run["load"] for run in runs]
    return {
        "seconds": statistics.median(load["seconds"] for load in loads),
        "of each run": [load["seconds"] for load in loads],
        "partition_bytes": runs[0]["partition"],
        "anonymous_bytes_over_partition": max(load["anonymous"] for load in loads) - runs[0]["partition"],
        "resident_bytes_over_partition": max(load["resident"] for load in loads) - runs[0]["partition"],
        "read by calls / files": max(load["bytes_by_calls"] for load in loads) / size,
    }


def _cold(side: str, folder: Path, world: int, size: int) -> dict[str, float]:
    """Seconds and bytes of a load for which the files' pages were dropped from the cache before."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    load = _run(side, folder, world)["load"]
    return {"seconds": load["seconds"], "read from the disk / files": load["bytes_from_disk"] / size}


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return round(tree, 3) if isinstance(tree, float) else tree


if __name__ == "__main__":
    main()
