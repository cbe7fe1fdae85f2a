"""Who holds which elements: the one description that save, resume and merge share.

    step-40/
      layout.json                        this module
      manifest.json                      every file, with sizes and checksums
      rank-00000-of-00002.safetensors    tensors `<sub-group>.<kind>`: master, and the optimizer's states
      rank-00001-of-00002.safetensors
      trainer.json, data.json            the trainer's state and the position in the data
      run.yaml, model/                   resolved run file; config, tokenizer and their like

Every rank's file has the same tensors. A parameter lies in a window of each rank's flat partition, the same on all:
`length` elements from `offset`. One rank's window after the other's, it takes the elements from number `first`:

    ZeRO-3   | a a a  b b | a a ·  b · |     a window a parameter: ceil(n / W) elements, padding after the last
    ZeRO-2   | a a a a a b | b b c c · · |   one for all: the whole partition, parameter behind parameter
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from bigtune.errors import CheckpointError

VERSION = 2
FILE = "layout.json"
BUFFERS = "buffers.safetensors"
"""In model/: the tensors of the model's files that are no parameters, for the few models that have any."""
MASTER = "master"
"""The kind of the float32 values; other kinds are the optimizer's names for its state tensors."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter's place in the ranks' flat partitions, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    first: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class State:
    """A kind of optimizer state: its dtype as safetensors names it, and elements that share one value.

    `block` is 1 for a state with a value an element, and e.g. 256 for the scales of 8-bit blocks, which are
    counted over the flat partition. `scales` is the kind of these, for 8-bit codes.
    """

    dtype: str
    block: int
    scales: str | None = None


@dataclass(frozen=True, slots=True)
class SubGroup:
    """One flat partition: `numel` elements a rank, of one optimizer group."""

    index: int
    group: str
    numel: int
    parameters: tuple[Parameter, ...]
    states: Mapping[str, State]
    scalars: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of one parameter in one rank's file: `count` elements, from `start` of the parameter."""

    rank: int
    sub_group: int
    offset: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one rank's partition, and where it lies in another layout's: `count` elements from `offset`."""

    offset: int
    source: Range


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a checkpoint.

    `tied` maps further names of a parameter to the name under which it is kept, and `joined` a parameter that the
    model's files hold in pieces or under another name to the pieces' names and shapes, in the order of its elements.
    """

    world_size: int
    dtype: str
    sub_groups: tuple[SubGroup, ...]
    tied: Mapping[str, str]
    joined: Mapping[str, Mapping[str, tuple[int, ...]]]

    def parameters(self) -> Iterator[tuple[SubGroup, Parameter]]:
        """Every parameter once, with its sub-group."""
        for sub_group in self.sub_groups:
            for parameter in sub_group.parameters:
                yield sub_group, parameter

    def ranges(self, sub_group: SubGroup, parameter: Parameter) -> Iterator[Range]:
        """Where the elements of a parameter lie, in order, without padding."""
        for rank in range(self.world_size):
            window = rank * parameter.length - parameter.first  # the element that lies, or would lie, at its head
            start, end = max(0, window), min(parameter.numel, window + parameter.length)
            if start < end:
                yield Range(rank, sub_group.index, parameter.offset + start - window, start, end - start)

    def segments(self, sub_group: SubGroup, rank: int, other: "Layout") -> Iterator[Segment]:
        """Where the elements of a rank's partition lie in another layout of the same parameters, parameter by
        parameter; what no segment covers is padding."""
        theirs = {parameter.name: (group, parameter) for group, parameter in other.parameters()}
        for parameter in sub_group.parameters:
            for mine in self.ranges(sub_group, parameter):
                if mine.rank != rank:
                    continue
                for piece in other.ranges(*theirs[parameter.name]):
                    start = max(mine.start, piece.start)
                    count = min(mine.start + mine.count, piece.start + piece.count) - start
                    if count > 0:
                        source = Range(piece.rank, piece.sub_group, piece.offset + start - piece.start, start, count)
                        yield Segment(mine.offset + start - mine.start, source)

    def write(self, folder: Path) -> None:
        """Write layout.json."""
        document = {"version": VERSION, **asdict(self)}
        (folder / FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Layout":
        """Read layout.json.

        Raises:
            CheckpointError: it is missing, broken, or of another version.
        """
        path = folder / FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["version"] != VERSION:
                raise CheckpointError(f"{path}: version {document['version']}; this bigtune reads version {VERSION}")
            return cls(
                world_size=document["world_size"],
                dtype=document["dtype"],
                sub_groups=tuple(_sub_group(entry) for entry in document["sub_groups"]),
                tied=document["tied"],
                joined={
                    name: {piece: tuple(shape) for piece, shape in pieces.items()}
                    for name, pieces in document.get("joined", {}).items()
                },
            )
        except FileNotFoundError:
            raise CheckpointError(f"{folder.absolute()}: no {FILE}; this is no bigtune checkpoint") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: broken layout ({error!r})") from None


def _sub_group(entry: Mapping[str, Any]) -> SubGroup:
    return SubGroup(
        index=entry["index"],
        group=entry["group"],
        numel=entry["numel"],
        parameters=tuple(Parameter(**{**item, "shape": tuple(item["shape"])}) for item in entry["parameters"]),
        states={name: State(**state) for name, state in entry["states"].items()},
        scalars=entry["scalars"],
    )
