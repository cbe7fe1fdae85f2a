"""Which tensors a merged model has, and which of its files holds each; nothing is read but headers."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import xxhash

from bigtune.checkpoint.base import Base
from bigtune.checkpoint.source import Source, Tensor
from bigtune.checkpoint.stream import NUMPY, Change, Output
from bigtune.errors import CheckpointError
from bigtune.model.folds import is_adapter

if TYPE_CHECKING:
    from bigtune.model.shards import Shards

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What a model may be merged into: torch's names, and the format's."""
SINGLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
PEFT = "base_model.model."
"""Before the names in an adapter's file."""

Files = Mapping[str, Sequence[Output]]
"""The tensors of each file, by its name."""


def whole_model(source: Source, dtype: str) -> list[Output]:
    """All tensors of a source, cast, under the names and in the pieces that the model's files have.

    Args:
        dtype: by the format's name; tensors of whole numbers keep their own.
    """
    return [output for tensor in source.tensors.values() for output in _as_in_files(source, tensor, dtype)]


def folded_model(source: Source, lora: Base, shards: "Shards", dtype: str) -> list[Output]:
    """What a LoRA run trained whole, and the base's tensors with adapters folded in."""
    outputs = list[Output]()
    for tensor in source.tensors.values():
        if not is_adapter(tensor.name):
            outputs += _as_in_files(source, tensor, dtype)
    for name, shape in lora.adapted.frozen.items():
        how = lora.adapted.folds.get(name)
        change = None
        if how is not None:
            change = Change(source.tensors[how.lora_a], source.tensors[how.lora_b], how.scale, how.transposed)
        rows = 0
        for piece, piece_shape in source.joined.get(name, {name: shape}).items():
            held = Tensor.at(piece, shards.places[piece])
            outputs.append(Output(piece, piece_shape, dtype, held, change=change, rows_before=rows))
            rows += piece_shape[0] if piece_shape else 1
    return outputs


def adapter_alone(source: Source, dtype: str) -> list[Output]:
    """As `peft.PeftModel.from_pretrained` reads them."""
    return [Output(PEFT + tensor.name, tensor.shape, dtype, tensor) for tensor in source.tensors.values()]


def _as_in_files(source: Source, tensor: Tensor, dtype: str) -> Iterator[Output]:
    start = 0
    for name, shape in source.joined.get(tensor.name, {tensor.name: tensor.shape}).items():
        yield Output(name, shape, dtype if tensor.dtype in NUMPY else tensor.dtype, tensor, start)
        start += prod(shape)
    if start != prod(tensor.shape):
        raise CheckpointError(
            f"{source.folder}: {tensor.name} has {prod(tensor.shape):,} elements, its pieces {start:,}; "
            "merge another step"
        )


def split(outputs: Iterable[Output], shard_bytes: int, carried: Iterable[Tensor] = ()) -> Files:
    """Tensors in the order of their names, in files of at most `shard_bytes`; a larger tensor has one of its own.

    Args:
        carried: what goes into the first file as it is.
    """
    shards: list[list[Output]] = []
    room = 0
    for output in sorted(outputs, key=lambda output: output.name):
        if not shards or output.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(output)
        room -= output.nbytes
    first = [Output(tensor.name, tensor.shape, tensor.dtype, tensor) for tensor in carried]
    shards[:1] = [first + shards[0]] if shards else [first]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def index_of(files: Files) -> str:
    """What model.safetensors.index.json says of several files."""
    size = sum(output.nbytes for outputs in files.values() for output in outputs)
    weight_map = {output.name: file for file, outputs in files.items() for output in outputs}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2) + "\n"


def fingerprint(source: Source, base: Base | None, files: Files) -> str:
    """Of what files are made of, and of what is to be in them: what a merge that was killed left is gone on with where
    it is the same."""
    plan = {name: [(output.name, output.dtype, output.shape) for output in outputs] for name, outputs in files.items()}
    made_of = [source.id, base.fingerprint if base else None, plan]
    return xxhash.xxh3_128_hexdigest(json.dumps(made_of).encode())
