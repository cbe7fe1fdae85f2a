"""What a model is merged from: each tensor's elements as stretches of files, whoever wrote them. Needs no torch.

`Source` is all that merging knows of a checkpoint: `of_checkpoint` makes it from bigtune's own layout, and
`deepspeed.of_deepspeed` from DeepSpeed's.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from bigtune.checkpoint.check import find_problems
from bigtune.checkpoint.folder import rank_file
from bigtune.checkpoint.layout import BUFFERS, FILE, MASTER, Layout, Parameter, SubGroup
from bigtune.checkpoint.manifest import Manifest, missing_or_cut
from bigtune.errors import CheckpointError
from bigtune.tensorfile import BYTES, BrokenFileError, Place, read_header

Shape = tuple[int, ...]
MASTER_DTYPE = "F32"
MODEL = "model"
"""The folder of config and tokenizer in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a tensor in a file: `count` elements, from number `start` of the tensor; `offset` is the first
    one's byte in the file."""

    path: Path
    offset: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor, and where its elements lie, little-endian, in a dtype by the format's name of it.

    `pieces` can be gone through any number of times: in the order of the elements, every element once.
    """

    name: str
    shape: Shape
    dtype: str
    pieces: Iterable[Piece]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @classmethod
    def at(cls, name: str, place: Place) -> "Tensor":
        """One that lies in a safetensors file as it is."""
        return cls(name, place.shape, place.dtype, (Piece(place.path, place.offset, 0, place.numel),))


@dataclass(frozen=True, slots=True)
class Source:
    """All of a checkpoint that becomes a model.

    `id` tells it from any other save, also of the same folder: output of another id is not gone on with.
    `tied` maps further names of a tensor to the one under which it is kept, and `joined` a tensor that the model's
    files hold in pieces or under another name to the pieces' names and shapes, in the order of its elements.
    `model` is the folder of config, tokenizer and their like, None where the checkpoint has none.
    `dtype` is what training computed in, as torch names it: bfloat16, float16 or float32.
    `manifest` has the checksums of the files that `used` names, with the tensors in them that the pieces are of (none
    for files of other kinds); None where the writer left no checksums. `carried` are tensors that are no parameters
    and go along as they are.
    """

    folder: Path
    id: str
    dtype: str
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str]
    joined: Mapping[str, Mapping[str, Shape]]
    model: Path | None
    manifest: Manifest | None = None
    used: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)


def of_checkpoint(checkpoint: Path) -> Source:
    """What bigtune's own checkpoint, a step-N folder, is merged from; its small files and the headers of the ranks' are
    read and checked, tensors are not.

    Raises:
        CheckpointError: a file is missing, cut, of another save or damaged.
    """
    manifest = Manifest.read(checkpoint)
    ranks = [name for name in manifest.files if manifest.is_of_rank(name)]
    small = [name for name in manifest.files if name in (FILE, "adapter.json") or name.startswith(f"{MODEL}/")]
    _refuse_damaged(checkpoint, manifest, ranks, small)
    layout = Layout.read(checkpoint)
    try:
        places = [read_header(rank_file(checkpoint, rank, layout.world_size))[0] for rank in range(layout.world_size)]
        masters = {part.index: [held[f"{part.index}.{MASTER}"] for held in places] for part in layout.sub_groups}
        buffers = checkpoint / MODEL / BUFFERS
        carried = read_header(buffers)[0] if buffers.is_file() else {}
    except (OSError, BrokenFileError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read ({error}); merge another step") from None
    for part in layout.sub_groups:
        if any((place.dtype, place.shape) != (MASTER_DTYPE, (part.numel,)) for place in masters[part.index]):
            raise CheckpointError(f"{checkpoint}: tensor {part.index}.{MASTER} is not as {FILE} has it")
    tensors = {
        parameter.name: Tensor(
            parameter.name, parameter.shape, MASTER_DTYPE, _Pieces(layout, part, parameter, masters[part.index])
        )
        for part, parameter in layout.parameters()
    }
    used = dict.fromkeys(ranks, tuple(f"{index}.{MASTER}" for index in masters))
    return Source(
        folder=checkpoint,
        id=manifest.id,
        dtype=layout.dtype,
        tensors=tensors,
        tied=layout.tied,
        joined=layout.joined,
        model=checkpoint / MODEL,
        manifest=manifest,
        used=used,
        carried={name: Tensor.at(name, place) for name, place in carried.items()},
    )


def _refuse_damaged(checkpoint: Path, manifest: Manifest, ranks: list[str], small: list[str]) -> None:
    """Small files are read, of the ranks' only the headers."""
    for name, problem in missing_or_cut(checkpoint, manifest, [*small, *ranks]).items():
        having = [host for host, names in manifest.disks.items() if name in names]
        where = (
            f"copy it from host {having[0]}" if having and not (checkpoint / name).exists() else "merge another step"
        )
        raise CheckpointError(f"{checkpoint}: {name} {problem}; {where}")
    used = {name: tuple(manifest.files[name].tensors) for name in small}
    for found in find_problems(checkpoint, manifest, used):
        raise CheckpointError(f"{checkpoint}: {found.file} {found.what}; merge another step")


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Of one parameter, made when they are asked for: a large model on many ranks has millions."""

    layout: Layout
    part: SubGroup
    parameter: Parameter
    masters: list[Place]

    def __iter__(self) -> Iterator[Piece]:
        for found in self.layout.ranges(self.part, self.parameter):
            place = self.masters[found.rank]
            yield Piece(place.path, place.offset + found.offset * BYTES[place.dtype], found.start, found.count)
