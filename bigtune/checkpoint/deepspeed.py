"""ZeRO-3 checkpoints that DeepSpeed itself wrote, as a `Source`. Needs neither DeepSpeed nor torch.

    checkpoint-40/                   what save_checkpoint was given
      latest                         global_step40
      config.json, tokenizer.json …  where Hugging Face's Trainer wrote it
      global_step40/                 two files of each rank; see zerofiles.py

What the values are is what `deepspeed.utils.zero_to_fp32` of DeepSpeed 0.19 says. Of a parameter of n elements a rank
has ceil(n / ranks), the last ones padding. Trained ones lie one behind the other in the order of `param_shapes`, over
the `fp32_flat_groups` as if these were one. Frozen ones are in the precision of training; buffers are whole.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path

import xxhash

from bigtune.checkpoint.check import MIB, Finding, Progress
from bigtune.checkpoint.folder import LATEST
from bigtune.checkpoint.source import Piece, Source, Tensor
from bigtune.checkpoint.torchfile import damaged
from bigtune.checkpoint.unpickle import shown
from bigtune.checkpoint.zerofiles import (
    ANOTHER,
    FLOATS,
    STATES,
    Master,
    Model,
    files_of,
    read_master,
    read_model,
    refuse_incomplete,
)
from bigtune.errors import CheckpointError
from bigtune.tensorfile import BYTES, Place

WRAPPER = "module."
ADAPTED = "base_model.model."
"""How peft's names of a model's parameters begin."""


def find(path: Path) -> Path | None:
    """The folder of the step that a path means: itself, what its `latest` names, or the only one in it.

    Returns:
        None where nothing is of DeepSpeed, as in a run's folder of bigtune's own.

    Raises:
        CheckpointError: `latest` names no folder with DeepSpeed's files, or there are several such folders.
    """
    if any(path.glob(STATES)):
        return path
    pointer, found = path / LATEST, sorted({file.parent for file in path.glob(f"*/{STATES}")})
    if pointer.is_file():
        name = pointer.read_bytes().decode("utf-8", "replace").strip()
        if path / name in found:
            return path / name
        if found or not (name.startswith("step-") or any(path.glob("step-*"))):  # which are bigtune's own
            raise CheckpointError(f"{pointer}: names {shown(name)}, which has no *_states.pt; give another folder")
    found = found or sorted({file.parent.parent for file in path.glob(f"checkpoint-*/*/{STATES}")})
    if len(found) > 1:
        names = ", ".join(shown(folder.name) for folder in found[:3]) + (" …" if len(found) > 3 else "")
        raise CheckpointError(f"{path.absolute()}: has several checkpoints of DeepSpeed's; give one of {names}")
    return find(found[0]) if found else None


def of_deepspeed(folder: Path) -> Source:
    """What a ZeRO-3 checkpoint of DeepSpeed's is merged from; pickles are read, tensors are not.

    Buffers are carried, in whatever dtype they have. The folder of config and tokenizer is the step's or the
    one that it lies in, whichever has a config.json.

    Args:
        folder: of one step, as `find` gives it.

    Raises:
        CheckpointError: a file is missing, cut, of another save or asks for code; or the checkpoint is of another stage
            than 3, of model parallelism, of experts over ranks, or lacks frozen parameters or float32 values.
    """
    files = files_of(folder)
    if not files.optimizers:
        raise CheckpointError(
            f"{folder}: no *_optim_states.pt, which have the float32 values; copy them from where it was written"
        )
    world = read_master(files.optimizers[min(files.optimizers)]).world
    refuse_incomplete(folder, files, world)
    masters = [read_master(files.optimizers[rank]) for rank in range(world)]
    models = [read_model(files.models[0])]
    if models[0].frozen:  # of which alone the others' have parts; to read them takes time where experts are many
        models += [read_model(files.models[rank]) for rank in range(1, world)]
    _refuse_other_saves(masters)
    _refuse_other_saves(models)
    tensors = {tensor.name: tensor for tensor in (*_frozen(models), *_trained(models[0], masters))}
    buffers = {name: Tensor.at(name, place) for name, place in models[0].buffers.items() if name not in tensors}
    tied = {name: kept for name, kept in models[0].tied.items() if kept in tensors}
    if all(name.startswith(WRAPPER) for name in (*tensors, *buffers, *tied)):
        tensors, buffers = _unwrapped(tensors), _unwrapped(buffers)
        tied = {_short(name): _short(kept) for name, kept in tied.items()}
    _refuse_adapters(folder, tensors)
    homes = [home for home in (folder, folder.absolute().parent) if (home / "config.json").is_file()]
    sums = [master.sums for master in masters] + [model.sums for model in models]
    return Source(
        folder=folder,
        id=xxhash.xxh3_128_hexdigest("".join(sums).encode()),
        dtype=models[0].dtype,
        tensors=tensors,
        tied=tied,
        joined={},
        model=homes[0] if homes else None,
        carried=buffers,
    )


def find_problems(folder: Path, progress: Progress | None = None) -> list[Finding]:
    """Read the values of a step's files, and tell what is not what was written, by the CRCs that zips have.

    They are there but where `torch.serialization.set_crc32_options` switched them off, which no one does by default.

    Raises:
        CheckpointError: as `of_deepspeed`.
    """
    files = files_of(folder)
    held = {path: read_master(path).groups for path in files.optimizers.values()}
    for path in files.models.values():
        model = read_model(path)
        held[path] = (*model.fragments.values(), *model.buffers.values())
    problems, done, total = list[Finding](), 0, sum(path.stat().st_size for path in held)
    for path, places in held.items():
        problems += [Finding(path.name, what) for what in damaged(path, [place.offset for place in places])]
        done += path.stat().st_size
        if progress:
            progress(done // MIB, total // MIB, "MiB checked")
    return problems


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_short(name): replace(tensor, name=_short(name)) for name, tensor in tensors.items()}


def _short(name: str) -> str:
    return name.removeprefix(WRAPPER)


def _refuse_other_saves(files: Sequence[Master] | Sequence[Model]) -> None:
    other = next((file for file in files if file.common != files[0].common), None)
    if other is not None:
        raise CheckpointError(f"{other.path}: is of another save than {files[0].path.name}; copy both from one save")


def _refuse_adapters(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    wrapped = next((name for name in tensors if name.startswith(ADAPTED)), None)
    if wrapped is not None:
        raise CheckpointError(
            f"{folder}: holds adapters of peft ({shown(wrapped)}); fold them in with peft's merge_and_unload"
        )


@dataclass(frozen=True, slots=True)
class _Spread:
    """A tensor over the ranks: of each at most `length` elements, from number `offset` of its places end to end.

    `ends` are those of the first rank's places, in elements, and so of every other's.
    """

    numel: int
    length: int
    offset: int
    ranks: Sequence[Sequence[Place]]
    ends: Sequence[int]

    def __iter__(self) -> Iterator[Piece]:
        for rank, places in enumerate(self.ranks):
            start, at = rank * self.length, self.offset
            end = min(start + self.length, self.numel)
            while start < end:
                index = bisect_right(self.ends, at)
                place, first = places[index], self.ends[index] - places[index].numel
                count = min(end - start, self.ends[index] - at)
                yield Piece(place.path, place.offset + (at - first) * BYTES[place.dtype], start, count)
                start, at = start + count, at + count


def _trained(model: Model, masters: Sequence[Master]) -> Iterator[Tensor]:
    groups, ranks = masters[0].groups, [master.groups for master in masters]
    ends, offset = list(accumulate(place.numel for place in groups)), 0
    dtype = groups[0].dtype if groups else "F32"
    for name, shape in model.trained.items():
        length = -(-prod(shape) // len(ranks))
        yield Tensor(name, shape, dtype, _Spread(prod(shape), length, offset, ranks, ends))
        offset += length
    held = ends[-1] if ends else 0
    if offset != held:
        raise CheckpointError(
            f"{masters[0].path}: has {held:,} master values where the shapes in {model.path.name} need {offset:,}; "
            "copy both from one save"
        )


def _frozen(models: Sequence[Model]) -> Iterator[Tensor]:
    for name, shape in models[0].frozen.items():
        length = -(-prod(shape) // len(models))
        ranks: list[tuple[Place]] = []
        for model in models:
            place = model.fragments.get(name)
            if place is None or place.numel != length or place.dtype not in FLOATS:
                raise CheckpointError(f"{model.path}: lacks its part of frozen parameter {shown(name)}; {ANOTHER}")
            if ranks and place.dtype != ranks[0][0].dtype:
                raise CheckpointError(f"{model.path}: has frozen parameters of another dtype than rank 0; {ANOTHER}")
            ranks.append((place,))
        yield Tensor(name, shape, ranks[0][0].dtype, _Spread(prod(shape), length, 0, ranks, (length,)))
