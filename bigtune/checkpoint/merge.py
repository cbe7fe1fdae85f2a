"""A checkpoint's partitions become a Hugging Face model: sharded safetensors, config and tokenizer.

One output file's tensors are in memory at a time, read by byte ranges through the layout.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bigtune.checkpoint.layout import BUFFERS, MASTER, Layout, Parameter, SubGroup, latest, rank_file
from bigtune.errors import CheckpointError
from bigtune.model.shards import INDEX, SINGLE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 5 * 10**9


def merge(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the model of a checkpoint into a folder, aside first, then renamed.

    Args:
        checkpoint: a step-N folder, a `checkpoints` folder, or a run's output folder (then the latest).
        dtype: bfloat16, float16 or float32; None for the precision that the base model's config names.

    Returns:
        The output folder.

    Raises:
        CheckpointError: no checkpoint there, a file of it is missing or broken, or the output is in use.
    """
    checkpoint = find_checkpoint(checkpoint)
    layout = Layout.read(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not empty; give another --output or remove it")
    config = _config(checkpoint / "model" / "config.json")
    name = dtype or config.get("dtype") or config.get("torch_dtype") or layout.dtype
    if name not in DTYPES:
        raise CheckpointError(f"--dtype {name}: give {', '.join(DTYPES)}")
    aside = output.with_name(output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(checkpoint / "model", aside)
        (aside / "config.json").write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n")
        _write_weights(checkpoint, layout, aside, DTYPES[name], shard_bytes, progress)
        if output.exists():
            output.rmdir()
        aside.rename(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{checkpoint}: could not be merged into {output}: {error}") from None
    return output


def find_checkpoint(path: Path) -> Path:
    """The step folder that a path means.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "layout.json").is_file():
            return folder
        found = latest(folder)
        if found is not None:
            return found
    raise CheckpointError(f"{path.absolute()}: no checkpoint here; give a step-N folder or a run's output folder")


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it from the base model") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SafetensorError(f"{path.name}: {error}") from None


def _write_weights(
    checkpoint: Path,
    layout: Layout,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    shards = _split(layout, dtype, shard_bytes)
    total = sum(len(shard) for shard in shards)
    files = [_open(rank_file(checkpoint, rank, layout.world_size)) for rank in range(layout.world_size)]
    buffers = load_file(folder / BUFFERS) if (folder / BUFFERS).exists() else {}
    (folder / BUFFERS).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    done = size = 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors, buffers = buffers, {}  # into the first file
        for sub_group, parameter in shard:
            flat = _whole(files, layout, sub_group, parameter, dtype)
            tensors |= _as_in_files(flat, layout, parameter)
            done += 1
            if progress:
                progress(done, total)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(layout: Layout, dtype: torch.dtype, shard_bytes: int) -> list[list[tuple[SubGroup, Parameter]]]:
    """Parameters in the order of their names, cut into files of at most `shard_bytes` where one fits."""
    shards: list[list[tuple[SubGroup, Parameter]]] = []
    room = 0
    for item in sorted(layout.parameters(), key=lambda item: item[1].name):
        size = item[1].numel * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(item)
        room -= size
    return shards


def _whole(
    files: list[safe_open], layout: Layout, sub_group: SubGroup, parameter: Parameter, dtype: torch.dtype
) -> torch.Tensor:
    flat = torch.empty(parameter.numel, dtype=dtype)
    for piece in layout.ranges(sub_group, parameter):
        source = files[piece.rank].get_slice(f"{piece.sub_group}.{MASTER}")
        flat[piece.start : piece.start + piece.count] = source[piece.offset : piece.offset + piece.count]
    return flat


def _as_in_files(flat: torch.Tensor, layout: Layout, parameter: Parameter) -> dict[str, torch.Tensor]:
    """A parameter's elements as the base model's files hold them: whole, or in pieces under names of their own."""
    pieces = layout.joined.get(parameter.name, {parameter.name: parameter.shape})
    parts = flat.split([prod(shape) for shape in pieces.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, pieces.items(), strict=True)}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB (powers of ten) or 2GiB (powers of two).

    Raises:
        CheckpointError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise CheckpointError(f"--max-shard-size {text}: write a size such as 5GB or 500MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
