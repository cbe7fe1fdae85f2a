"""Checkpoints with chosen values, written without training, for what merging and verifying make of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtune.checkpoint.folder import rank_file
from bigtune.checkpoint.layout import Layout, Parameter, State, SubGroup
from bigtune.checkpoint.manifest import ID, Manifest
from bigtune.tensorfile import Content, sums_of, write

Array = npt.NDArray[Any]
SMALL = {
    "config.json": json.dumps({"model_type": "llama", "dtype": "float32", "auto_map": {"AutoConfig": "evil.Config"}}),
    "generation_config.json": "{}",
    "tokenizer.json": '{"model": {}}',
    "additional_chat_templates/tools.jinja": "{{ messages }}",
}


def values(shape: Sequence[int], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_tensors() -> dict[str, Array]:
    """Of sizes that no number of ranks divides."""
    shapes = {"embed.weight": (37, 12), "layer.0.weight": (12, 31), "layer.1.weight": (5, 7, 3), "norm.bias": (13,)}
    shapes |= {"one": (1,), "empty": (0, 3)}
    return {name: values(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def make_checkpoint(
    folder: Path,
    tensors: Mapping[str, Array],
    ranks: int = 3,
    stage: int = 3,
    joined: Mapping[str, Mapping[str, tuple[int, ...]]] = {},
    extra: Mapping[str, str] = {},
    small: Mapping[str, str] = SMALL,
    saved_as: str = "0123",
) -> Path:
    """Write a step's folder as ZeRO-2 or ZeRO-3 would: two sub-groups, with optimizer states that merging ignores."""
    (folder / "model").mkdir(parents=True)
    names = list(tensors)
    groups = [group for group in (names[: len(names) // 2], names[len(names) // 2 :]) if group]
    parts, flats = list[SubGroup](), list[list[Array]]()
    for index, group in enumerate(groups):
        parameters, flat = (_stage_3 if stage == 3 else _stage_2)({name: tensors[name] for name in group}, ranks)
        states = {"exp_avg": State("float32", 1)}
        parts.append(SubGroup(index, f"group {index}", len(flat[0]), parameters, states, {"step": 1.0}))
        flats.append(flat)
    layout = Layout(ranks, "float32", tuple(parts), {}, joined)
    layout.write(folder)
    for name, text in {
        **{f"model/{name}": text for name, text in small.items()},
        "trainer.json": "{}",
        **extra,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    sums = {str(path.relative_to(folder)): sums_of(path) for path in folder.rglob("*") if path.is_file()}
    for rank in range(ranks):
        path = rank_file(folder, rank, ranks)
        masters = {f"{index}.master": flat[rank] for index, flat in enumerate(flats)}
        moments = {f"{index}.exp_avg": -flat[rank] for index, flat in enumerate(flats)}
        contents = {name: Content("F32", array.shape, _bytes(array)) for name, array in {**moments, **masters}.items()}
        sums[path.name] = write(path, contents, {ID: saved_as})
    Manifest(saved_as, sums).write(folder)
    return folder


def _bytes(array: Array) -> Iterator[memoryview]:
    yield memoryview(array.tobytes())


def _stage_3(tensors: Mapping[str, Array], ranks: int) -> tuple[tuple[Parameter, ...], list[Array]]:
    parameters, windows, offset = list[Parameter](), list[list[Array]](), 0
    for name, tensor in tensors.items():
        length = -(-tensor.size // ranks)
        parameters.append(Parameter(name, tensor.shape, offset, length))
        padded = np.full(length * ranks, np.float32(9e9))  # padding that would be seen
        padded[: tensor.size] = tensor.ravel()
        windows.append(np.split(padded, ranks))
        offset += length
    return tuple(parameters), [np.concatenate([window[rank] for window in windows]) for rank in range(ranks)]


def _stage_2(tensors: Mapping[str, Array], ranks: int) -> tuple[tuple[Parameter, ...], list[Array]]:
    flat = np.concatenate([tensor.ravel() for tensor in tensors.values()])
    numel = -(-flat.size // ranks)
    padded = np.concatenate([flat, np.full(numel * ranks - flat.size, np.float32(9e9))])
    parameters, first = list[Parameter](), 0
    for name, tensor in tensors.items():
        parameters.append(Parameter(name, tensor.shape, 0, numel, first))
        first += tensor.size
    return tuple(parameters), np.split(padded, ranks)


def damage_tensor(path: Path, tensor: str) -> None:
    """Change one bit in the middle of a tensor of a safetensors file."""
    from bigtune.tensorfile import read_header

    place = read_header(path)[0][tensor]
    flip(path, place.offset + place.nbytes // 2)


def flip(path: Path, at: int) -> None:
    """Change one bit of a file, counted from its end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
