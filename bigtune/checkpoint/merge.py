"""A checkpoint's partitions become a Hugging Face model: sharded safetensors, config and tokenizer.

One output file's tensors are in memory at a time, read by byte ranges through the layout. Adapters are folded into the
base model's tensors on the way, or written alone, as one file.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bigtune.checkpoint.base import Base, Named, fold
from bigtune.checkpoint.layout import BUFFERS, MASTER, Layout, Parameter, SubGroup, latest, rank_file
from bigtune.errors import CheckpointError, ModelError
from bigtune.model.adapter import is_adapter
from bigtune.model.shards import INDEX, SINGLE, Shards
from bigtune.model.weights import Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 5 * 10**9


def merge(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    adapter: bool = False,
    base: Path | None = None,
) -> Path:
    """Write the model of a checkpoint into a folder, aside first, then renamed.

    Args:
        checkpoint: a step-N folder, a `checkpoints` folder, or a run's output folder (then the latest).
        dtype: bfloat16, float16 or float32; None for the precision that the base model's config names, and float32
            for an adapter.
        adapter: of a LoRA run, write the adapter alone, as peft loads it, instead of the model with it folded in.
        base: the base model's folder, if it moved since a LoRA run.

    Returns:
        The output folder.

    Raises:
        CheckpointError: no checkpoint there, a file of it is missing or broken, the output is in use, or the base
            model of a LoRA run is gone or another.
    """
    checkpoint = find_checkpoint(checkpoint)
    layout = Layout.read(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not empty; give another --output or remove it")
    config = _config(checkpoint / "model" / "config.json")
    lora = Base.read(checkpoint)
    if lora is None and any(is_adapter(parameter.name) for _, parameter in layout.parameters()):
        raise CheckpointError(f"{checkpoint}: holds adapters, but lacks adapter.json; merge another step")
    if adapter and lora is None:
        raise CheckpointError(f"--adapter: {checkpoint} is of a run without adapter, which trained the whole model")
    name = dtype or ("float32" if adapter else config.get("dtype") or config.get("torch_dtype") or layout.dtype)
    if name not in DTYPES:
        raise CheckpointError(f"--dtype {name}: give {', '.join(DTYPES)}")
    shards = lora.shards(checkpoint, base) if lora and not adapter else None
    aside = output.with_name(output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(checkpoint / "model", aside)
        tensors = _trained(checkpoint, layout)
        if lora and adapter:
            _write_adapter(tensors, lora, aside, DTYPES[name])
        else:
            (aside / "config.json").write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n")
            whole = fold(tensors, lora, _weights(shards, lora, layout)) if lora and shards else tensors
            _write_weights(whole, layout, aside, DTYPES[name], shard_bytes, progress)
        if output.exists():
            output.rmdir()
        aside.rename(output)
    except (OSError, SafetensorError, ModelError) as error:
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


def _trained(checkpoint: Path, layout: Layout) -> dict[str, Named]:
    """The parameters of a checkpoint, by name."""
    files = [_open(rank_file(checkpoint, rank, layout.world_size)) for rank in range(layout.world_size)]
    return {
        parameter.name: Named(parameter.name, parameter.shape, partial(_whole, files, layout, sub_group, parameter))
        for sub_group, parameter in layout.parameters()
    }


def _weights(shards: Shards, lora: Base, layout: Layout) -> Weights:
    """The base model's own values, as they lie in its files."""
    return Weights(shards, {name: tuple(layout.joined.get(name, (name,))) for name in lora.adapted.frozen})


def _write_weights(
    tensors: Mapping[str, Named],
    layout: Layout,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    shards = _split(tensors, dtype, shard_bytes)
    buffers = load_file(folder / BUFFERS) if (folder / BUFFERS).exists() else {}
    (folder / BUFFERS).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    done = size = 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        read, buffers = buffers, {}  # into the first file
        for tensor in shard:
            read |= _as_in_files(tensor, layout, dtype)
            done += 1
            if progress:
                progress(done, len(tensors))
        weight_map |= dict.fromkeys(read, name)
        size += sum(tensor.nbytes for tensor in read.values())
        _save(read, folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_adapter(tensors: Mapping[str, Named], lora: Base, folder: Path, dtype: torch.dtype) -> None:
    """As `peft.PeftModel.from_pretrained` reads it; such a folder has no config of a model."""
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    _save(
        {f"base_model.model.{name}": tensor.read(dtype) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {**lora.adapted.config, "base_model_name_or_path": str(lora.path)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _split(tensors: Mapping[str, Named], dtype: torch.dtype, shard_bytes: int) -> list[list[Named]]:
    """Tensors in the order of their names, cut into files of at most `shard_bytes` where one fits."""
    shards: list[list[Named]] = []
    room = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.name):
        size = prod(tensor.shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _whole(
    files: list[safe_open], layout: Layout, sub_group: SubGroup, parameter: Parameter, dtype: torch.dtype
) -> torch.Tensor:
    flat = torch.empty(parameter.numel, dtype=dtype)
    for piece in layout.ranges(sub_group, parameter):
        source = files[piece.rank].get_slice(f"{piece.sub_group}.{MASTER}")
        flat[piece.start : piece.start + piece.count] = source[piece.offset : piece.offset + piece.count]
    return flat.view(parameter.shape)


def _as_in_files(tensor: Named, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tensor as the base model's files hold it: whole, or in pieces under names of their own."""
    pieces = layout.joined.get(tensor.name, {tensor.name: tensor.shape})
    parts = tensor.read(dtype).flatten().split([prod(shape) for shape in pieces.values()])
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
