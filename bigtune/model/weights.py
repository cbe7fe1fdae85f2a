"""Where a model's parameters lie in its files, under the names and in the pieces that the files have.

Files and model differ where transformers renames tensors on load, and where it lays several end to end, as with
mixtures of experts, whose files hold each expert apart:

    …experts.gate_up_proj [2, 2F, D]  =  …experts.0.w1 ‖ …experts.0.w3 ‖ …experts.1.w1 ‖ …experts.1.w3

Such a parameter is read by ranges of its elements all the same, and no rank ever holds a whole group. The rules are
transformers' own (`transformers.conversion_mapping`), for the ways of joining that keep a tensor's elements together.

Shapes: F expert width, D model width.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from bigtune.errors import ModelError
from bigtune.model.shards import DTYPES, WEIGHTS, Shards, named

Shape = tuple[int, ...]
Pieces = tuple[str, ...]
"""Names of the files' tensors that make a parameter, in the order of its elements."""
BLOCK = 2**22
"""Elements that are compared at once."""
OTHER_CONFIG = "give the config.json that belongs to the files"
UNQUANTIZED = "bigtune trains models of float32, bfloat16 or float16 alone: give the model before it was quantized"


class Weights:
    """A model's tensors in the files of its folder, under the model's own names."""

    def __init__(
        self,
        shards: Shards,
        pieces: Mapping[str, Pieces],
        shapes: Mapping[str, Shape] = {},
        buffers: Collection[str] = (),
        again: Mapping[str, Sequence[Pieces]] = {},
        unexpected: Sequence[str] = (),
    ) -> None:
        """Of tensors that are known already; of a model's see `of`.

        Args:
            shapes: of the model's parameters, and of those of its buffers that files hold, `buffers`.
            again: where the files hold parameters a second time, under names that are tied to them.
            unexpected: tensors of the files for which the model has no place.
        """
        self.shards, self.pieces, self.unexpected = shards, dict(pieces), unexpected
        self._shapes, self._buffers, self._again = shapes, buffers, again

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path, grown: Collection[str] = ()) -> "Weights":
        """Read the headers of all files, and fit them to the model; no tensor is read.

        Args:
            grown: parameters that may have fewer rows in the files than in the model.

        Raises:
            ModelError: no readable files, tensors that are missing, misshapen or of a dtype that is not read, or joined
                in a way that is not known.
        """
        shards, buffers, tied = Shards(folder), saved_buffers(model), tied_names(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *buffers.items())}
        pieces, spare = _pieces(model, shards, {*shapes, *tied})
        again = _take_tied(pieces, tied)
        weights = cls(shards, pieces, shapes, buffers, again, _unexpected(model, spare))
        weights._check(grown)
        return weights

    @property
    def joined(self) -> dict[str, dict[str, Shape]]:
        """Parameters that the files hold under other names or in pieces: name → the shape of each piece."""
        return {
            name: {
                piece: self._shapes[name] if len(pieces) == 1 else self.shards.places[piece].shape for piece in pieces
            }
            for name, pieces in self.pieces.items()
            if pieces != (name,)
        }

    def rows(self, name: str) -> int:
        """Of a parameter that the files hold in one piece."""
        (piece,) = self.pieces[name]
        return self.shards.places[piece].shape[0]

    def read(self, name: str, start: int, count: int, out: torch.Tensor) -> None:
        """Fill `out[:count]` with elements start … start + count of a parameter, flattened, cast to its dtype.

        Raises:
            ModelError: the files hold the parameter a second time, under a name that is tied to it, with other values.
        """
        self._read(self.pieces[name], start, count, out)
        for pieces in self._again.get(name, ()):
            for done in range(0, count, BLOCK):
                part = out[done : min(done + BLOCK, count)]
                other = torch.empty_like(part)
                self._read(pieces, start + done, len(part), other)
                if not torch.equal(part, other):
                    self._refuse(
                        f"{', '.join(self.pieces[name])} and {', '.join(pieces)} hold other values, though the config "
                        "ties them; if both are meant, set tie_word_embeddings to false in its config.json"
                    )

    def _read(self, pieces: Pieces, start: int, count: int, out: torch.Tensor) -> None:
        sizes = [prod(self.shards.places[piece].shape) for piece in pieces]
        for piece, size, end in zip(pieces, sizes, accumulate(sizes), strict=True):
            first, last = max(start, end - size), min(start + count, end)
            if first < last:
                self.shards.read(piece, first - (end - size), last - first, out[first - start : last - start])

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """What the files hold beside parameters, which training does not change, as it is there."""
        held = {}
        for name in self._buffers:
            for piece in self.pieces[name]:
                place = self.shards.places[piece]
                held[piece] = torch.empty(place.shape, dtype=DTYPES[place.dtype])
                self.shards.read(piece, 0, prod(place.shape), held[piece].view(-1))
        return held

    def _check(self, grown: Collection[str]) -> None:
        missing = [name for name in self._shapes if name not in self.pieces]
        if missing:
            packed = [name for name in self.unexpected if self.shards.places[name].dtype not in WEIGHTS]
            mend = f"download them again, or {OTHER_CONFIG}"
            if packed:
                mend = f"they hold {named(packed)} as {self.shards.places[packed[0]].dtype}; {UNQUANTIZED}"
            self._refuse(f"the files lack {len(missing):,} of the model's tensors: {named(missing)}; {mend}")
        for name, shape in self._shapes.items():
            self._check_pieces(name, self.pieces[name], shape, name in grown)
            for pieces in self._again.get(name, ()):  # the files' own rows, where the model has more
                first = self.shards.places[self.pieces[name][0]].shape
                self._check_pieces(", ".join(pieces), pieces, first if name in grown else shape)

    def _check_pieces(self, name: str, pieces: Pieces, shape: Shape, may_grow: bool = False) -> None:
        places = [self.shards.places[piece] for piece in pieces]
        unread = [
            (piece, place.dtype) for piece, place in zip(pieces, places, strict=True) if place.dtype not in WEIGHTS
        ]
        if unread:
            self._refuse(f"tensor {unread[0][0]} is {unread[0][1]}, a dtype that bigtune does not read; {UNQUANTIZED}")
        shapes = [place.shape for place in places]
        found, number = " and ".join(str(list(one)) for one in sorted(set(shapes))), len(shapes)
        fewer = may_grow and shapes[0][:1] < shape[:1] and shapes[0][1:] == shape[1:]
        if number == 1 and shapes[0] != shape and not fewer:
            problem = f"has shape {found}"
        elif number > 1 and sum(map(prod, shapes)) != prod(shape):
            problem = f"is made of {number} of shape {found}"
        else:
            return
        self._refuse(f"tensor {name} {problem}, the config asks for {list(shape)}; {OTHER_CONFIG}")

    def _refuse(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.shards.folder}: {problem}")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that several modules share: name → the name that is kept."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def saved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that a model's files hold (few models have any)."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _pieces(
    model: PreTrainedModel, shards: Shards, wanted: Collection[str]
) -> tuple[dict[str, Pieces], list[tuple[str, str]]]:
    """The files' tensors of each parameter, and those of none, with the name that the model would have for each.

    A parameter that the files hold under its own name is taken as it is.
    """
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    known = dict.fromkeys(wanted, True)
    found: dict[str, Pieces] = {}
    spare: list[tuple[str, str]] = []
    groups: dict[str, list[tuple[int, tuple[Any, ...], str]]] = defaultdict(list)
    used: dict[str, WeightConverter] = {}
    for tensor in sorted(shards.places, key=lambda tensor: (tensor not in known, _natural(tensor))):
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, known)
        if name not in known and tensor in known:
            name, pattern = tensor, None
        if name not in known or name in found:
            spare.append((name, tensor))
        elif pattern is None:
            found[name] = (tensor,)
        else:
            converter = used[name] = next(one for one in converters if pattern in one.source_patterns)
            groups[name].append((converter.source_patterns.index(pattern), _natural(tensor), tensor))
    for name, members in groups.items():
        found[name] = _in_order(shards.folder, name, members, used[name])
    return found, spare


def _take_tied(found: dict[str, Pieces], tied: Mapping[str, str]) -> dict[str, list[Pieces]]:
    """Take the further names of tied parameters out of `found`. Files may hold one under any of its names, or under
    several, as transformers accepts it.

    Returns:
        Where the files hold parameters again.
    """
    again: dict[str, list[Pieces]] = defaultdict(list)
    for further, name in tied.items():
        pieces = found.pop(further, None)
        if pieces is not None and found.setdefault(name, pieces) is not pieces:
            again[name].append(pieces)
    return again


def _unexpected(model: PreTrainedModel, spare: Collection[tuple[str, str]]) -> list[str]:
    """Of the tensors that have no place in a model, those that transformers would tell of too: some types declare what
    their files hold besides, and old files hold buffers that models now compute."""
    report = SimpleNamespace(missing_keys=set(), unexpected_keys={name for name, _ in spare})
    model._adjust_missing_and_unexpected_keys(report)
    return sorted((tensor for name, tensor in spare if name in report.unexpected_keys), key=_natural)


def _in_order(
    folder: Path, name: str, members: list[tuple[int, tuple[Any, ...], str]], rule: WeightConverter
) -> Pieces:
    """The members of a group as their elements lie in the parameter.

    Raises:
        ModelError: the rule moves elements about, so that no range of the parameter is one of a tensor's.
    """
    operations = [(type(one), getattr(one, "dim", None)) for one in rule.operations]
    if operations in ([(MergeModulelist, 0)], [(Concatenate, 0)]):
        return tuple(tensor for _, _, tensor in sorted(members))
    if operations == [(MergeModulelist, 0), (Concatenate, 1)]:
        # Sources are stacked over experts, then joined within each: expert by expert, source by source.
        by_source: dict[int, list[tuple[tuple[Any, ...], str]]] = defaultdict(list)
        for source, natural, tensor in members:
            by_source[source].append((natural, tensor))
        columns = [[tensor for _, tensor in sorted(by_source[source])] for source in sorted(by_source)]
        if len({len(column) for column in columns}) == 1:
            return tuple(tensor for expert in zip(*columns, strict=True) for tensor in expert)
        raise ModelError(
            f"{folder}: the files lack some of the {len(members)} tensors that make {name}; download them again"
        )
    names = ", ".join(type(one).__name__ for one in rule.operations)
    raise ModelError(
        f"{folder}: the files hold {name} in another form than the model, and bigtune does not know the way ({names}); "
        "save the model once with transformers' save_pretrained(save_original_format=False)"
    )


def _natural(name: str) -> tuple[Any, ...]:
    """Sorts `experts.2` before `experts.10`."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name))
